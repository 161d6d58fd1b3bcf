#include "ffi/cublaslt_library.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <utility>

namespace jax_fp8::lt {
namespace {

std::mutex mutex;
std::vector<std::string>& candidates() {
  static std::vector<std::string> paths;
  return paths;
}

// A copy that is in the process already comes first: mixing two of them in one process costs
// memory and, across major versions, correctness.
void* open_library() {
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (void* found = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return found;
  }
  for (const std::string& path : candidates()) {
    if (void* found = dlopen(path.c_str(), RTLD_NOW)) return found;
  }
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (void* found = dlopen(name, RTLD_NOW)) return found;
  }
  return nullptr;
}

template <typename Function>
bool find(void* library, const char* name, Function& function, std::string* missing) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) *missing += std::string(" ") + name;
  return function != nullptr;
}

bool load(Api& api, std::string* error) {
  void* so = open_library();
  if (so == nullptr) {
    *error =
        "cublasLt was not found: neither libcublasLt.so.13 nor .12 is loaded, beside the installed "
        "packages or on the library path; install jax[cuda13] or jax[cuda12]";
    return false;
  }
  std::string missing;
#define JAX_FP8_FIND(name) find(so, "cublasLt" #name, api.name, &missing)
  JAX_FP8_FIND(GetVersion);
  JAX_FP8_FIND(GetStatusString);
  JAX_FP8_FIND(Create);
  JAX_FP8_FIND(MatmulDescCreate);
  JAX_FP8_FIND(MatmulDescDestroy);
  JAX_FP8_FIND(MatmulDescSetAttribute);
  JAX_FP8_FIND(MatrixLayoutCreate);
  JAX_FP8_FIND(MatrixLayoutDestroy);
  JAX_FP8_FIND(MatrixLayoutSetAttribute);
  JAX_FP8_FIND(MatmulPreferenceCreate);
  JAX_FP8_FIND(MatmulPreferenceDestroy);
  JAX_FP8_FIND(MatmulPreferenceSetAttribute);
  JAX_FP8_FIND(MatmulAlgoGetHeuristic);
  JAX_FP8_FIND(MatmulAlgoConfigGetAttribute);
  JAX_FP8_FIND(MatmulAlgoConfigSetAttribute);
  JAX_FP8_FIND(MatmulAlgoCheck);
  JAX_FP8_FIND(Matmul);
#undef JAX_FP8_FIND
  if (!missing.empty()) {
    *error = "the loaded cublasLt lacks" + missing;
    return false;
  }
  if (const size_t version = api.GetVersion(); version < kOldestVersion) {
    *error = "cublasLt " + version_string(version) + " is too old: its FP8 products give wrong " +
             "results; " + version_string(kOldestVersion) + " or newer is needed";
    return false;
  }
  return true;
}

}  // namespace

void set_candidates(std::vector<std::string> paths) {
  const std::lock_guard lock(mutex);
  candidates() = std::move(paths);
}

const Api* library(std::string* error) {
  static Api api;
  static std::atomic<bool> loaded = false;
  if (loaded) return &api;
  const std::lock_guard lock(mutex);
  if (!loaded) {
    if (!load(api, error)) return nullptr;
    loaded = true;
  }
  return &api;
}

std::string version_string(size_t version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

}  // namespace jax_fp8::lt
