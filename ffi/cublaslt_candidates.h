// The algorithms that cublasLt offers for a product, without those that are wrong.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ffi/cublaslt_abi.h"

namespace jax_fp8::lt {

// A product as cublasLt has it described.
struct Description {
  Handle handle;
  MatmulDesc desc;
  Layout w, x, c, d;
  int64_t m, k;
  int64_t workspace;  // Bytes that an algorithm may ask for.
  bool vectors;       // With a scale for each row of both operands.
};

struct Candidate {
  Algo algo;
  int64_t workspace;  // Bytes that it asks for.
  std::string name;   // Its configuration, which tells it from the others.
};

// Those without workspace first, and of these the likeliest to be fast. None, with the reason in
// `*why`, where cublasLt has none.
std::vector<Candidate> find_candidates(const Api& api, const Description& product,
                                       std::string* why);

}  // namespace jax_fp8::lt
