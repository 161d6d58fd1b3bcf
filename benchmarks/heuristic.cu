// cublasLt's FP8 product called directly: what its first heuristic takes, and the best of up to 8.
//
//   heuristic LIBCUBLASLT M,N,K,CALLS,COPIES ...
//
// D (M, N) bf16 = X (M, K) W (N, K)^T, both E4M3, a scalar scale each, fast accumulation. As in
// timing.py: chains of CALLS and of 2 CALLS, here CUDA graphs, behind a kernel that keeps the
// device busy, with COPIES of W by turns and every D kept. One line of JSON for each problem.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "benchmarks/chain.cuh"
#include "ffi/cublaslt_abi.h"

namespace lt = jax_fp8::lt;
using bench::Memory;

namespace {

constexpr int kCandidates = 8;
constexpr size_t kWorkspace = size_t{32} << 20;

lt::Api api;

void check(lt::Status status, const char* what) {
  if (status != lt::kSuccess) {
    throw std::runtime_error(std::string(what) + ": " + api.GetStatusString(status));
  }
}
#define LT(call) check(api.call, "cublasLt" #call)

struct Problem {
  int64_t m, n, k;
  int calls, copies;
};

class Product {
 public:
  explicit Product(const Problem& problem)
      : p_(problem), x_(p_.m * p_.k), workspace_(kWorkspace), scales_(512), count_(8) {
    const cudaStream_t stream = watch_.stream();
    bench::fill<<<1024, 256, 0, stream>>>(x_.as<uint8_t>(), p_.m * p_.k, 0);
    for (int i = 0; i < p_.copies; ++i) {
      w_.emplace_back(p_.n * p_.k);
      bench::fill<<<1024, 256, 0, stream>>>(w_.back().as<uint8_t>(), p_.n * p_.k, 1 + i);
    }
    BENCH_CUDA(cudaGetLastError());
    for (int i = 0; i < 2 * p_.calls; ++i) d_.emplace_back(2 * p_.m * p_.n);
    const float scale = 0.0125f;
    // 256 bytes apart: cublasLt wants scales at multiples of 16 bytes.
    for (int i = 0; i < 2; ++i) {
      BENCH_CUDA(cudaMemcpyAsync(scales_.as<char>() + 256 * i, &scale, sizeof scale,
                                 cudaMemcpyHostToDevice, stream));
    }
    BENCH_CUDA(cudaStreamSynchronize(stream));
    describe();
  }

  ~Product() {
    api.MatmulDescDestroy(desc_);
    for (const lt::Layout layout : {lw_, lx_, ld_}) api.MatrixLayoutDestroy(layout);
  }

  std::vector<lt::HeuristicResult> candidates(lt::Handle handle) {
    lt::Preference preference;
    LT(MatmulPreferenceCreate(&preference));
    const uint64_t workspace = kWorkspace;
    LT(MatmulPreferenceSetAttribute(preference, lt::kPrefMaxWorkspace, &workspace,
                                    sizeof workspace));
    std::vector<lt::HeuristicResult> found(kCandidates);
    int count = 0;
    LT(MatmulAlgoGetHeuristic(handle, desc_, lw_, lx_, ld_, ld_, preference, kCandidates,
                              found.data(), &count));
    api.MatmulPreferenceDestroy(preference);
    found.resize(count);
    std::erase_if(found, [](const auto& result) { return result.state != lt::kSuccess; });
    if (found.empty()) throw std::runtime_error("cublasLt has no algorithm for it");
    return found;
  }

  float try_algorithm(lt::Handle handle, const lt::Algo& algo) {
    return bench::try_calls(watch_, p_.calls, [&](int i) { multiply(handle, algo, i); });
  }

  bench::Timing time(lt::Handle handle, const lt::Algo& algo) {
    // All ones is a NaN, which no product of finite values is.
    for (const Memory& d : d_) {
      BENCH_CUDA(cudaMemsetAsync(d.as<void>(), 0xff, 2 * p_.m * p_.n, watch_.stream()));
    }
    const bench::Timing timing =
        bench::time_calls(watch_, p_.calls, [&](int i) { multiply(handle, algo, i); });
    check_written();
    return timing;
  }

 private:
  void describe() {
    LT(MatmulDescCreate(&desc_, lt::kComputeF32, lt::kTypeF32));
    const auto set = [&](lt::DescAttribute attribute, auto value) {
      LT(MatmulDescSetAttribute(desc_, attribute, &value, sizeof value));
    };
    set(lt::kDescTransA, lt::kOpT);
    set(lt::kDescFastAccum, int8_t{1});
    set(lt::kDescAScalePointer, scales_.as<void>());
    set(lt::kDescBScalePointer, static_cast<void*>(scales_.as<char>() + 256));
    // In cublasLt's column-major terms D is (n, m), of W^T by X.
    LT(MatrixLayoutCreate(&lw_, lt::kTypeE4M3, p_.k, p_.n, p_.k));
    LT(MatrixLayoutCreate(&lx_, lt::kTypeE4M3, p_.k, p_.m, p_.k));
    LT(MatrixLayoutCreate(&ld_, lt::kTypeBF16, p_.n, p_.m, p_.n));
  }

  void multiply(lt::Handle handle, const lt::Algo& algo, int i) {
    const float one = 1.0f, zero = 0.0f;
    LT(Matmul(handle, desc_, &one, w_[i % w_.size()].as<void>(), lw_, x_.as<void>(), lx_, &zero,
              nullptr, ld_, d_[i].as<void>(), ld_, &algo, workspace_.as<void>(), kWorkspace,
              watch_.stream()));
  }

  void check_written() {
    BENCH_CUDA(cudaMemsetAsync(count_.as<void>(), 0, 8, watch_.stream()));
    for (const Memory& d : d_) {
      bench::count_nan<<<1024, 256, 0, watch_.stream()>>>(d.as<uint16_t>(), p_.m * p_.n,
                                                          count_.as<unsigned long long>());
    }
    BENCH_CUDA(cudaGetLastError());
    unsigned long long missing = 0;
    BENCH_CUDA(
        cudaMemcpyAsync(&missing, count_.as<void>(), 8, cudaMemcpyDeviceToHost, watch_.stream()));
    BENCH_CUDA(cudaStreamSynchronize(watch_.stream()));
    if (missing) throw std::runtime_error(std::to_string(missing) + " elements were not written");
  }

  Problem p_;
  bench::Stopwatch watch_;
  Memory x_, workspace_, scales_, count_;
  std::vector<Memory> w_, d_;
  lt::MatmulDesc desc_ = nullptr;
  lt::Layout lw_ = nullptr, lx_ = nullptr, ld_ = nullptr;
};

void load(const char* path) {
  void* library = dlopen(path, RTLD_NOW);
  if (library == nullptr) throw std::runtime_error(dlerror());
#define FIND(name)                                                                   \
  api.name = reinterpret_cast<decltype(api.name)>(dlsym(library, "cublasLt" #name)); \
  if (api.name == nullptr) throw std::runtime_error("no cublasLt" #name)
  FIND(GetVersion);
  FIND(GetStatusString);
  FIND(Create);
  FIND(MatmulDescCreate);
  FIND(MatmulDescDestroy);
  FIND(MatmulDescSetAttribute);
  FIND(MatrixLayoutCreate);
  FIND(MatrixLayoutDestroy);
  FIND(MatmulPreferenceCreate);
  FIND(MatmulPreferenceDestroy);
  FIND(MatmulPreferenceSetAttribute);
  FIND(MatmulAlgoGetHeuristic);
  FIND(MatmulAlgoConfigGetAttribute);
  FIND(Matmul);
#undef FIND
}

std::string describe(const lt::Algo& algo) {
  const auto get = [&](int attribute) {
    int64_t value = 0;  // The attributes are of 2 and 4 bytes.
    size_t written = 0;
    if (api.MatmulAlgoConfigGetAttribute(&algo, attribute, &value, 4, &written) != lt::kSuccess) {
      api.MatmulAlgoConfigGetAttribute(&algo, attribute, &value, 2, &written);
    }
    return std::to_string(value);
  };
  return "id " + get(lt::kAlgoId) + ", tile " + get(lt::kAlgoTile) + ", stages " +
         get(lt::kAlgoStages) + ", cluster " + get(lt::kAlgoCluster) + ", split-k " +
         get(lt::kAlgoSplitK) + ", reduction " + get(lt::kAlgoReductionScheme) + ", swizzle " +
         get(lt::kAlgoSwizzle) + ", custom " + get(lt::kAlgoCustom) + ", inner " +
         get(lt::kAlgoInnerShape);
}

void print_timing(const char* name, const bench::Timing& t, int calls, const lt::Algo& algo) {
  std::printf(
      ", \"%s\": {\"us\": %.4f, \"us_min\": %.4f, \"us_iqr\": %.4f, \"calls\": %d, \"pairs\": %d, "
      "\"algorithm\": \"%s\", \"cublaslt\": %zu}",
      name, t.us, t.us_min, t.us_iqr, calls, bench::kPairs, describe(algo).c_str(),
      api.GetVersion());
}

void run(lt::Handle handle, const Problem& problem) {
  Product product(problem);
  const std::vector<lt::HeuristicResult> found = product.candidates(handle);
  size_t best = 0;
  float best_us = 1e30f;
  for (size_t i = 0; i < found.size(); ++i) {
    try {
      const float us = product.try_algorithm(handle, found[i].algo);
      if (us < best_us) best_us = us, best = i;
    } catch (const std::exception& error) {  // One that is offered and does not run.
      if (i == 0) throw;
      std::fprintf(stderr, "candidate %zu: %s\n", i, error.what());
    }
  }
  const bench::Timing first = product.time(handle, found[0].algo);
  bench::Timing fastest = best == 0 ? first : product.time(handle, found[best].algo);
  if (fastest.us > first.us) fastest = first, best = 0;
  print_timing("cpp_first", first, problem.calls, found[0].algo);
  print_timing("cpp_best", fastest, problem.calls, found[best].algo);
}

std::string quoted(std::string text) {
  std::replace(text.begin(), text.end(), '"', '\'');
  return '"' + text + '"';
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc < 3) throw std::runtime_error("usage: heuristic LIBCUBLASLT M,N,K,CALLS,COPIES ...");
    load(argv[1]);
    lt::Handle handle = nullptr;
    LT(Create(&handle));
    for (int i = 2; i < argc; ++i) {
      long long m, n, k;
      Problem problem;
      if (std::sscanf(argv[i], "%lld,%lld,%lld,%d,%d", &m, &n, &k, &problem.calls,
                      &problem.copies) != 5) {
        throw std::runtime_error(std::string("not a problem: ") + argv[i]);
      }
      problem.m = m, problem.n = n, problem.k = k;
      std::printf("{\"m\": %lld, \"n\": %lld, \"k\": %lld", m, n, k);
      try {
        run(handle, problem);
      } catch (const std::exception& error) {
        std::printf(", \"error\": %s", quoted(error.what()).c_str());
      }
      std::printf("}\n");
      std::fflush(stdout);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
