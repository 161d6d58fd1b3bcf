#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ffi/cublaslt_timing.h"
#include "ffi/device.h"
#include "ffi/race.h"

namespace jax_fp8::lt {
namespace {

// A race ends when this is over, if each candidate ran often enough.
constexpr double kBudgetMs = 40;
// The device's time for the first runs of the candidates, which come in the order that cublasLt
// likes them: of a huge product those that are not reached by then are left out.
constexpr float kFirstRunsUs = 200'000;
// What computes much for each byte is raced on a device that is as hot as it makes it: the fastest
// candidate on a cool device may draw more power than others, and then be slower than they are.
constexpr double kHotFlopsPerByte = 1000;
constexpr float kHotUs = 20;
constexpr float kWarmUpUs = 60'000;
// At its limit of power the device finds the clock of a candidate only within a tenth of a second
// of it alone, and the order of candidates is then another one than in turns: so many of those
// within such a margin of the fastest run for about so long each, the second half of it timed.
constexpr int kMostAlone = 8;
constexpr float kAloneMargin = 1.08f;
constexpr float kAloneUs = 90'000;
// A product that takes so long is timed well by one run of it.
constexpr float kLongUs = 5000;
// The device's time for one round: the fewer candidates are left, the longer each one runs, and the
// more the clock is the one that its own power leaves.
constexpr float kRoundUs = 3000;
// A chain of so many calls, or of so long, is one graph, as in XLA's programs: the times of short
// kernels would otherwise be those of the host.
constexpr int kMostCalls = 16;
constexpr float kChainUs = 150;
// While the host fills the queue.
constexpr float kHeadStartUs = 200;
// Scales and biases of these bytes are of about 0.01 in float32 and bfloat16 and 1 in float16.
constexpr int kSmallBytes = 0x3c;

std::atomic<int64_t> memory_limit{INT64_MAX};

__device__ uint64_t mix(uint64_t z) {  // splitmix64
  z += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Near-normal values up to 448, the largest of E4M3: the power that a product draws, and so its
// clock, depends on the data.
template <Type type>
__global__ void fill(uint8_t* data, int64_t size, uint64_t seed) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += stride) {
    const uint64_t bits = mix(seed + i);
    const int sum = static_cast<int>((bits & 0xffff) + (bits >> 16 & 0xffff) +
                                     (bits >> 32 & 0xffff) + (bits >> 48)) -
                    2 * 0xffff;
    data[i] = encode<type>(448.0f / (2 * 0xffff) * sum);
  }
}

void fill_random(uint8_t* data, int64_t size, Type type, uint64_t seed, cudaStream_t stream) {
  const auto kernel = type == Type::kE4M3 ? fill<Type::kE4M3> : fill<Type::kE5M2>;
  kernel<<<1024, 256, 0, stream>>>(data, size, seed << 48);
}

__global__ void spin(int64_t clocks) {
  const int64_t start = clock64();
  while (clock64() - start < clocks) {
  }
}

bool is_hot(const Problem& p) {
  const double n = static_cast<double>(p.n), m = static_cast<double>(p.m);
  const double k = static_cast<double>(p.k);
  return 2 * m * n * k > kHotFlopsPerByte * (m * k + n * k + m * n * byte_width(p.d));
}

int64_t align_up(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// The memory, the stream, the events and the graphs of one race.
class Scratch {
 public:
  explicit Scratch(const Problem& problem) : problem_(problem) {
    w_bytes_ = align_up(problem.batch * problem.n * problem.k);
    d_bytes_ = align_up(problem.batch * problem.m * problem.n * byte_width(problem.d));
    error_ = allocate();
    if (error_ == cudaSuccess) error_ = prepare();
  }

  ~Scratch() {
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    for (const auto& [candidate, chain] : chains_) cudaGraphExecDestroy(chain);
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
    cudaFree(memory_);
    cudaGetLastError();  // What failed here is no error of what comes next.
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  cudaError_t error() const { return error_; }
  cudaStream_t stream() const { return stream_; }
  void* workspace() const { return workspace_; }

  // What the next call points to. The weights and the results of a chain rotate over copies, of
  // which the others exceed the L2 cache, for a model comes back to them after all of its layers.
  const Pointers& next() {
    at_.w = w_ + calls_ % w_copies_ * w_bytes_;
    at_.d = d_ + calls_ % d_copies_ * d_bytes_;
    ++calls_;
    return at_;
  }

  cudaEvent_t event(size_t i) {
    while (events_.size() <= i) {
      cudaEvent_t event = nullptr;
      note(cudaEventCreate(&event));
      events_.push_back(event);
    }
    return events_[i];
  }

  void mark(size_t i) { note(cudaEventRecord(event(i), stream_)); }

  float us_between(size_t first, size_t second) {
    float ms = 0;
    note(cudaEventElapsedTime(&ms, events_[first], events_[second]));
    return 1e3f * ms;
  }

  void head_start() {
    spin<<<1, 1, 0, stream_>>>(static_cast<int64_t>(kHeadStartUs * 2000));  // At about 2 GHz.
    note(cudaGetLastError());
  }

  // Captures what `calls` does, which returns an error or "".
  template <typename Calls>
  std::string make_chain(int candidate, Calls calls) {
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    std::string why = calls();
    error = cudaStreamEndCapture(stream_, &graph);  // Or the stream could not be used again.
    if (why.empty() && error == cudaSuccess) {
      cudaGraphExec_t chain = nullptr;
      error = cudaGraphInstantiate(&chain, graph, 0);
      if (error == cudaSuccess) {
        chains_[candidate] = chain;
        error = cudaGraphUpload(chain, stream_);
      }
    }
    if (graph != nullptr) cudaGraphDestroy(graph);
    if (error != cudaSuccess) cudaGetLastError();
    return why.empty() && error != cudaSuccess ? cudaGetErrorString(error) : why;
  }

  void run_chain(int candidate) { note(cudaGraphLaunch(chains_.at(candidate), stream_)); }

  bool wait() {
    note(cudaStreamSynchronize(stream_));
    return error_ == cudaSuccess;
  }

 private:
  void note(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  // One allocation with all in it.
  cudaError_t allocate() {
    const Problem& p = problem_;
    int l2 = 0;
    size_t free = 0, total = 0;
    cudaError_t error = device_attribute(cudaDevAttrL2CacheSize, &l2);
    if (error == cudaSuccess) error = cudaMemGetInfo(&free, &total);
    if (error != cudaSuccess) return error;
    // Others may allocate at the same time.
    const int64_t most = std::min<int64_t>(memory_limit, static_cast<int64_t>(free / 2));

    const int64_t x = align_up(p.batch * p.m * p.k);
    // Enough for a scale of each row, and of each block in any layout.
    const int64_t blocks = ceil_div(p.k, kBlock);
    const int64_t x_scale = align_up(4 * (p.m + kBlock) * blocks);
    const int64_t w_scale = align_up(4 * (p.n + kBlock) * blocks);
    const int64_t bias = align_up(4 * p.n);
    const int64_t rest = x + x_scale + w_scale + bias + 512 + align_up(p.workspace);
    const auto all = [&] { return w_copies_ * w_bytes_ + d_copies_ * d_bytes_ + rest; };
    w_copies_ = 1 + ceil_div(2 * int64_t{l2}, w_bytes_);
    d_copies_ = 1 + ceil_div(2 * int64_t{l2}, d_bytes_);
    if (all() > most) w_copies_ = d_copies_ = 1;
    if (all() > most) return cudaErrorMemoryAllocation;
    error = cudaMalloc(&memory_, all());
    if (error != cudaSuccess) return error;

    auto* free_from = static_cast<uint8_t*>(memory_);
    const auto take = [&](int64_t bytes) {
      uint8_t* const start = free_from;
      free_from += bytes;
      return start;
    };
    w_ = take(w_copies_ * w_bytes_);
    x_ = take(x);
    at_.x = x_;
    small_ = free_from;
    uint8_t* const x_scales = take(x_scale);
    uint8_t* const w_scales = take(w_scale);
    uint8_t* const biases = take(bias);
    uint8_t* const out_scale = take(256);
    if (p.scaled) {
      at_.x_scale = reinterpret_cast<float*>(x_scales);
      at_.w_scale = reinterpret_cast<float*>(w_scales);
    }
    if (p.has_bias) at_.bias = biases;
    if (p.out_scale) at_.out_scale = reinterpret_cast<float*>(out_scale);
    small_bytes_ = free_from - small_;
    uint8_t* const amax = take(256);
    if (p.out_scale) at_.amax = reinterpret_cast<float*>(amax);
    d_ = take(d_copies_ * d_bytes_);
    workspace_ = take(align_up(p.workspace));
    return cudaSuccess;
  }

  cudaError_t prepare() {
    cudaError_t error = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    if (error != cudaSuccess) return error;
    fill_random(w_, w_copies_ * w_bytes_, problem_.w, 1, stream_);
    fill_random(x_, problem_.batch * problem_.m * problem_.k, problem_.x, 2, stream_);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    error = cudaMemsetAsync(small_, kSmallBytes, small_bytes_, stream_);
    if (error == cudaSuccess && at_.amax != nullptr) {
      error = cudaMemsetAsync(at_.amax, 0, sizeof(float), stream_);
    }
    return error;
  }

  const Problem& problem_;
  cudaError_t error_ = cudaSuccess;
  void* memory_ = nullptr;
  void* workspace_ = nullptr;
  uint8_t *w_ = nullptr, *x_ = nullptr, *d_ = nullptr, *small_ = nullptr;
  int64_t w_bytes_, d_bytes_, w_copies_ = 1, d_copies_ = 1, small_bytes_ = 0, calls_ = 0;
  Pointers at_{};
  cudaStream_t stream_ = nullptr;
  std::vector<cudaEvent_t> events_;
  std::map<int, cudaGraphExec_t> chains_;
};

Timed failed(const std::string& why_not) {
  Timed result;
  result.why_not = why_not;
  return result;
}

Timed failed(cudaError_t error) {
  return failed(error == cudaErrorMemoryAllocation ? "out of memory" : cudaGetErrorString(error));
}

// Microseconds of a call of a chain of `calls`, each of which takes about `us`, once the device is
// at the clock that it has with it. What fails is in scratch->error().
float time_alone(Scratch* scratch, int candidate, float us, int calls) {
  const int repeats =
      std::max(1, static_cast<int>(kAloneUs / 2 / (us * static_cast<float>(calls))));
  for (int repeat = 0; repeat < 2 * repeats; ++repeat) {
    if (repeat == repeats) scratch->mark(0);
    scratch->run_chain(candidate);
  }
  scratch->mark(1);
  return scratch->wait() ? scratch->us_between(0, 1) / static_cast<float>(calls * repeats) : 0.0f;
}

}  // namespace

Timed time_candidates(const Problem& problem, int count, const Start& start) {
  const RelaxedCapture relaxed;
  Scratch scratch(problem);
  if (scratch.error() != cudaSuccess) return failed(scratch.error());
  const auto run = [&](int candidate) {
    return start(candidate, scratch.next(), scratch.workspace(), scratch.stream());
  };

  // The first run of a kernel loads it; the second tells about how long it takes.
  Race race(count);
  std::string error = "no candidate runs";
  std::vector<float> once(count, 0.0f);
  float least = 0.0f, spent_us = 0.0f;
  for (int i = 0; i < count; ++i) {
    if (spent_us > kFirstRunsUs) {
      race.drop(i);
      continue;
    }
    std::string why = run(i);
    scratch.head_start();
    scratch.mark(0);
    if (why.empty()) why = run(i);
    scratch.mark(1);
    if (!scratch.wait()) return failed(scratch.error());
    if (why.empty()) {
      once[i] = scratch.us_between(0, 1);
      spent_us += 2 * once[i];
      if (least == 0.0f || once[i] < least) least = once[i];
    } else {
      error = why;
      race.drop(i);
    }
  }
  if (race.next().empty()) return failed(error);
  if (least > kLongUs) {  // One run tells enough to leave out what is slow.
    const std::vector<int> order = race.next();
    std::vector<float> times;
    for (const int i : order) times.push_back(once[i]);
    race.add(order, times);
  }
  const int calls = std::clamp(static_cast<int>(std::ceil(kChainUs / least)), 1, kMostCalls);
  for (const int i : race.next()) {
    const std::string why = scratch.make_chain(i, [&] {
      std::string failure;
      for (int call = 0; call < calls && failure.empty(); ++call) failure = run(i);
      return failure;
    });
    if (why.empty()) continue;
    error = why;
    race.drop(i);
  }

  // The first launch of a graph takes the host long.
  for (const int i : race.next()) scratch.run_chain(i);
  const bool hot = least > kHotUs && is_hot(problem);
  if (hot && !race.decided(false)) {
    for (float us = 0.0f; us < kWarmUpUs; us += least * calls) scratch.run_chain(race.next()[0]);
  }
  if (!scratch.wait()) return failed(scratch.error());
  const auto begin = std::chrono::steady_clock::now();
  bool expired = false;
  while (!race.decided(expired)) {
    const std::vector<int> order = race.next();
    const int repeats = std::max(
        1, static_cast<int>(kRoundUs / (least * calls * static_cast<float>(order.size()))));
    scratch.head_start();
    for (size_t i = 0; i < order.size(); ++i) {
      scratch.mark(i);
      for (int repeat = 0; repeat < repeats; ++repeat) scratch.run_chain(order[i]);
    }
    scratch.mark(order.size());
    if (!scratch.wait()) return failed(scratch.error());
    std::vector<float> times;
    for (size_t i = 0; i < order.size(); ++i) {
      times.push_back(scratch.us_between(i, i + 1) / static_cast<float>(calls * repeats));
    }
    race.add(order, times);
    const std::chrono::duration<double, std::milli> passed =
        std::chrono::steady_clock::now() - begin;
    expired = passed.count() > kBudgetMs;
  }
  Timed result;
  result.winner = race.winner();
  if (result.winner < 0) return failed(error);
  result.us = race.median(result.winner);
  Race last = race.finalists(kAloneMargin, kMostAlone);
  // Where one chain takes longer, each was alone in its turns.
  if (hot && !last.decided(false) && result.us * static_cast<float>(calls) < kAloneUs / 2) {
    const std::vector<int> order = last.next();
    std::vector<float> times;
    for (const int i : order) times.push_back(time_alone(&scratch, i, race.median(i), calls));
    last.add(order, times);
    result.winner = last.winner();
    result.us = last.median(result.winner);
  }
  if (scratch.error() != cudaSuccess) return failed(scratch.error());
  if (result.us == 0.0f) result.us = once[result.winner];  // It was alone.
  return result;
}

void limit_timing_memory(int64_t bytes) { memory_limit = bytes; }

}  // namespace jax_fp8::lt
