// Times the algorithms that cublasLt offers for a problem.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>

#include "ffi/cublaslt_plan.h"

namespace jax_fp8::lt {

// Starts the product with a candidate; returns an error or "".
using Start = std::function<std::string(int candidate, const Pointers& at, void* workspace,
                                        cudaStream_t stream)>;

struct Timed {
  int winner = -1;  // -1 where nothing could be timed, and `why_not` says why.
  float us = 0;     // Of a call of the winner.
  std::string why_not;
};

// Runs `count` candidates on random data in memory of its own, which is freed again, and on a
// stream of its own; a candidate that fails is left out. Waits for the current device, so it is
// not for a thread that other devices wait for.
Timed time_candidates(const Problem& problem, int count, const Start& start);

// The thread may allocate, load kernels and wait while it or another one captures a graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// No more memory than this is taken; for tests.
void limit_timing_memory(int64_t bytes);

}  // namespace jax_fp8::lt
