// cublasLt's FP8 product called directly, with each of the candidates that jax_fp8 has; and a plain
// copy.
//
//   heuristic LIBCUBLASLT
//
// D (M, N) bf16 = X (M, K) W (N, K)^T, both E4M3, fast accumulation, with one scale for each
// operand or for each row. As in timing.py: chains of CALLS and of 2 CALLS, here CUDA graphs,
// behind a kernel that keeps the device busy and LEADS runs of both, with COPIES of W by turns and
// every D kept. It answers each line with a line of JSON, so that timing.py can time it by turns
// with others:
//
//   open SLOT M N K CALLS COPIES ROW HEAD_START_US   tries the candidates and keeps the fastest
//   pair SLOT LEADS                                  times CALLS and 2 CALLS with it
//   close                                            forgets all slots
//   copy BYTES                                       the rate of a copy, read and written
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/chain.cuh"
#include "ffi/cublaslt_candidates.h"
#include "ffi/cublaslt_library.h"

namespace lt = jax_fp8::lt;
using bench::Memory;

namespace {

constexpr size_t kFinalists = 6;
constexpr int64_t kWorkspace = int64_t{32} << 20;

const lt::Api* api = nullptr;

void check(lt::Status status, const char* what) {
  if (status != lt::kSuccess) {
    throw std::runtime_error(std::string(what) + ": " + api->GetStatusString(status));
  }
}
#define LT(call) check(api->call, "cublasLt" #call)

struct Problem {
  int64_t m, n, k;
  int calls, copies;
  bool row;  // A scale for each row.
  float head_start_us;
};

class Product {
 public:
  Product(lt::Handle handle, const Problem& problem)
      : p_(problem),
        handle_(handle),
        watch_(static_cast<int64_t>(1e3f * problem.head_start_us)),
        x_(p_.m * p_.k),
        workspace_(kWorkspace),
        scales_(4 * (p_.m + p_.n) + 256),
        count_(8) {
    const cudaStream_t stream = watch_.stream();
    bench::fill<<<1024, 256, 0, stream>>>(x_.as<uint8_t>(), p_.m * p_.k, 0);
    for (int i = 0; i < p_.copies; ++i) {
      w_.emplace_back(p_.n * p_.k);
      bench::fill<<<1024, 256, 0, stream>>>(w_.back().as<uint8_t>(), p_.n * p_.k, 1 + i);
    }
    BENCH_CUDA(cudaGetLastError());
    for (int i = 0; i < 2 * p_.calls; ++i) d_.emplace_back(2 * p_.m * p_.n);
    const std::vector<float> scales(p_.m + p_.n + 64, 0.0125f);
    BENCH_CUDA(cudaMemcpyAsync(scales_.as<void>(), scales.data(), 4 * scales.size(),
                               cudaMemcpyHostToDevice, stream));
    BENCH_CUDA(cudaStreamSynchronize(stream));
    describe();
  }

  ~Product() {
    api->MatmulDescDestroy(desc_);
    for (const lt::Layout layout : {lw_, lx_, ld_}) api->MatrixLayoutDestroy(layout);
  }

  // Tries all candidates, then the fastest of them at length; returns how many there are.
  size_t choose() {
    std::string why;
    const std::vector<lt::Candidate> found = lt::find_candidates(
        *api, {handle_, desc_, lw_, lx_, ld_, ld_, p_.m, p_.k, kWorkspace, p_.row}, &why);
    if (found.empty()) throw std::runtime_error(why);
    std::vector<std::pair<float, size_t>> tried;
    for (size_t i = 0; i < found.size(); ++i) {
      try {
        tried.emplace_back(attempt(found[i], std::max(2, p_.calls / 4)), i);
      } catch (const std::exception& error) {  // One that is offered and does not run.
        std::fprintf(stderr, "candidate %zu: %s\n", i, error.what());
      }
    }
    if (tried.empty()) throw std::runtime_error("no candidate of cublasLt runs");
    std::sort(tried.begin(), tried.end());
    if (tried.size() > kFinalists) tried.resize(kFinalists);
    float best = 1e30f;
    for (const auto& [_, i] : tried) {
      const float us = attempt(found[i], 2 * p_.calls);
      if (us < best) best = us, fastest_ = found[i], index_ = i;
    }
    for (const Memory& d : d_) {  // All ones is a NaN, which no product of finite values is.
      BENCH_CUDA(cudaMemsetAsync(d.as<void>(), 0xff, 2 * p_.m * p_.n, watch_.stream()));
    }
    const auto call = [this](int i) { multiply(fastest_, i); };
    once_ = std::make_unique<bench::Chain>(watch_, p_.calls, call);
    twice_ = std::make_unique<bench::Chain>(watch_, 2 * p_.calls, call);
    twice_->replay();
    check_written();
    return found.size();
  }

  const lt::Candidate& fastest() const { return fastest_; }
  size_t index() const { return index_; }

  std::pair<float, float> pair(int leads) const { return once_->replay(*twice_, leads); }

 private:
  void describe() {
    LT(MatmulDescCreate(&desc_, lt::kComputeF32, lt::kTypeF32));
    const auto set = [&](lt::DescAttribute attribute, auto value) {
      LT(MatmulDescSetAttribute(desc_, attribute, &value, sizeof value));
    };
    set(lt::kDescTransA, lt::kOpT);
    set(lt::kDescFastAccum, int8_t{1});
    if (p_.row) {
      set(lt::kDescAScaleMode, lt::kScaleOuterVec);
      set(lt::kDescBScaleMode, lt::kScaleOuterVec);
    }
    // cublasLt wants scales at multiples of 16 bytes.
    set(lt::kDescAScalePointer, scales_.as<void>());
    set(lt::kDescBScalePointer, static_cast<void*>(scales_.as<float>() + (p_.n + 63) / 64 * 64));
    // In cublasLt's column-major terms D is (n, m), of W^T by X.
    LT(MatrixLayoutCreate(&lw_, lt::kTypeE4M3, p_.k, p_.n, p_.k));
    LT(MatrixLayoutCreate(&lx_, lt::kTypeE4M3, p_.k, p_.m, p_.k));
    LT(MatrixLayoutCreate(&ld_, lt::kTypeBF16, p_.n, p_.m, p_.n));
  }

  // Microseconds of a call, roughly.
  float attempt(const lt::Candidate& candidate, int calls) const {
    const bench::Chain chain(watch_, calls, [&](int i) { multiply(candidate, i); });
    chain.replay();
    return std::min(chain.replay(), chain.replay()) / calls;
  }

  void multiply(const lt::Candidate& candidate, int i) const {
    const float one = 1.0f, zero = 0.0f;
    LT(Matmul(handle_, desc_, &one, w_[i % w_.size()].as<void>(), lw_, x_.as<void>(), lx_, &zero,
              nullptr, ld_, d_[i].as<void>(), ld_, &candidate.algo, workspace_.as<void>(),
              candidate.workspace, watch_.stream()));
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
  lt::Handle handle_;
  bench::Stopwatch watch_;
  Memory x_, workspace_, scales_, count_;
  std::vector<Memory> w_, d_;
  lt::MatmulDesc desc_ = nullptr;
  lt::Layout lw_ = nullptr, lx_ = nullptr, ld_ = nullptr;
  lt::Candidate fastest_{};
  size_t index_ = 0;
  std::unique_ptr<bench::Chain> once_, twice_;
};

// GB/s, read and written, of the faster of a kernel and cudaMemcpy.
float copy_rate(int64_t bytes) {
  const bench::Stopwatch watch(500'000);
  Memory from(bytes), to(bytes);
  bench::fill<<<1024, 256, 0, watch.stream()>>>(from.as<uint8_t>(), bytes, 0);
  BENCH_CUDA(cudaGetLastError());
  float us = 1e30f;
  const auto time = [&](auto call) { us = std::min(us, bench::time_calls(watch, 4, call).us); };
  time([&](int) {
    BENCH_CUDA(cudaMemcpyAsync(to.as<void>(), from.as<void>(), bytes, cudaMemcpyDeviceToDevice,
                               watch.stream()));
  });
  time([&](int) {
    const int64_t count = bytes / static_cast<int64_t>(sizeof(uint4));
    bench::copy<<<static_cast<unsigned>((count + 1023) / 1024), 256, 0, watch.stream()>>>(
        from.as<uint4>(), to.as<uint4>(), count);
    BENCH_CUDA(cudaGetLastError());
  });
  return 2e-3f * bytes / us;
}

std::string quoted(std::string text) {
  std::replace(text.begin(), text.end(), '"', '\'');
  std::replace(text.begin(), text.end(), '\n', ' ');
  return '"' + text + '"';
}

class Server {
 public:
  Server() { LT(Create(&handle_)); }

  // The answer to a line, without its braces.
  std::string answer(const std::string& line) {
    std::istringstream in(line);
    std::ostringstream out;
    std::string verb;
    int slot = 0, leads = 0;
    in >> verb;
    if (verb == "open") {
      Problem p;
      if (!(in >> slot >> p.m >> p.n >> p.k >> p.calls >> p.copies >> p.row >> p.head_start_us)) {
        throw std::runtime_error("not a problem: " + line);
      }
      slots_.erase(slot);
      auto product = std::make_unique<Product>(handle_, p);
      const size_t count = product->choose();
      out << "\"candidates\": " << count << ", \"index\": " << product->index()
          << ", \"algorithm\": " << quoted(product->fastest().name)
          << ", \"cublaslt\": " << api->GetVersion();
      slots_[slot] = std::move(product);
    } else if (verb == "pair" && in >> slot >> leads && slots_.count(slot)) {
      const auto [once, twice] = slots_.at(slot)->pair(leads);
      out << "\"pair\": [" << once << ", " << twice << "]";
    } else if (verb == "close") {
      slots_.clear();
    } else if (int64_t bytes = 0; verb == "copy" && in >> bytes) {
      out << "\"gb_per_s\": " << copy_rate(bytes);
    } else {
      throw std::runtime_error("not understood: " + line);
    }
    return out.str();
  }

 private:
  lt::Handle handle_ = nullptr;
  std::map<int, std::unique_ptr<Product>> slots_;
};

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 2) throw std::runtime_error("usage: heuristic LIBCUBLASLT");
    lt::set_candidates({argv[1]});
    std::string why;
    api = lt::library(&why);
    if (api == nullptr) throw std::runtime_error(why);
    Server server;
    for (std::string line; std::getline(std::cin, line);) {
      std::string answer;
      try {
        answer = server.answer(line);
      } catch (const std::exception& error) {
        answer = "\"error\": " + quoted(error.what());
      }
      std::cout << '{' << answer << '}' << std::endl;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
