// The product through cublasLt: what it takes directly, and what takes a second kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "ffi/product.h"

namespace jax_fp8::lt {

enum class Outcome { kDone, kUnsupported, kFailed };

struct Result {
  Outcome outcome;
  std::string reason;  // For an outcome other than kDone.
};

struct Ran {
  std::string algorithm;
  int64_t workspace = 0;
  std::string version;
  std::string choice;  // How the algorithm was chosen, and from how many.
  int64_t candidates = 0;
};

struct Call {
  const Product* product;
  int capability;  // As 90 for 9.0: the device's own, or one that is pretended.
  int device;
  void* workspace;
  int64_t workspace_size;
  cudaStream_t stream;
  bool compiling = false;  // There are no arrays yet, and time to choose.
};

// Makes the plans of a call.
Result prepare(const Call& call);

// Runs it: the GEMMs, and the kernels around them. Does not synchronize, and allocates nothing but
// cublasLt's handle where a device has none yet.
Result run(const Call& call, Ran* ran);

}  // namespace jax_fp8::lt
