// Plans: the descriptors, layouts and algorithm of one GEMM of cublasLt, made once and kept.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "ffi/cublaslt_abi.h"
#include "ffi/product.h"

namespace jax_fp8::lt {

// All that tells one plan from another. Addresses do not: they are multiples of 16 bytes, and what
// cublasLt 13.1 offers for those is what it offers for multiples of 256.
//
// In cublasLt's column-major terms D is (n, m) = W^T-transposed (k, n) by X (k, m): W is its A, X
// its B. That is the TN form, the only one that Ada and Hopper have in FP8.
struct Problem {
  int device;
  int64_t batch, m, n, k;
  Type x, w, d;
  bool has_bias;
  Type bias;
  Activation activation;
  bool vectors;  // A scale for each row of both operands.
  bool blocks;   // One for each 128 of K of each row of X, and of W too,
  bool tiles;    // unless W has one for each 128 x 128.
  bool scaled;   // With scales: without, the sums come out as they are.
  bool out_scale;
  bool fast;
  int64_t workspace;

  auto tie() const {
    return std::tie(device, batch, m, n, k, x, w, d, has_bias, bias, activation, vectors, blocks,
                    tiles, scaled, out_scale, fast, workspace);
  }
  bool operator<(const Problem& other) const { return tie() < other.tie(); }
};

// What one GEMM points to.
struct Pointers {
  const void* x;
  const void* w;
  void* d;
  const float* x_scale;
  const float* w_scale;
  const void* bias;
  const float* out_scale;
  float* amax;
};

struct Plan;

// Largest power of two up to 256 that divides an address.
int alignment_of(const void* pointer);

// The plan of `problem`, made now if need be; null with the reason where that fails.
//
// Candidates are timed when `compiling` alone. That waits for the device, whose work may wait for
// other devices, whose threads may wait for the one that is in its execute stage.
std::shared_ptr<Plan> find_plan(const Api& api, const Problem& problem, const Pointers& at,
                                bool compiling, std::string* reason);

// Why cublasLt has no algorithm for it; empty when it has one.
const std::string& refusal(const Plan& plan);
// The id and the configuration of the algorithm, and the bytes of workspace that it asks for.
const std::string& algorithm(const Plan& plan);
int64_t workspace(const Plan& plan);
// How it was chosen, as plans() says it, and from how many.
const std::string& choice(const Plan& plan);
int64_t candidates(const Plan& plan);

// Runs the GEMM. `workspace` has the bytes that the problem states. Returns an error or "".
std::string multiply(const Api& api, Plan* plan, const Pointers& at, void* workspace,
                     cudaStream_t stream);

}  // namespace jax_fp8::lt
