// Finds and loads cublasLt: at first use, and the copy that XLA uses.
#pragma once

#include <string>
#include <vector>

#include "ffi/cublaslt_abi.h"

namespace jax_fp8::lt {

constexpr size_t kOldestVersion = 120901;

// Full paths to try when no copy is in the process yet.
void set_candidates(std::vector<std::string> paths);

// The library's functions; null with the reason in `*error` when there is none, or it is too old.
// A failure is not remembered: XLA may load its copy later.
const Api* library(std::string* error);

std::string version_string(size_t version);

}  // namespace jax_fp8::lt
