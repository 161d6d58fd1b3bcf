// What timing.py does in Python, for programs in CUDA C++: chains of calls, random operands, and
// errors that are exceptions.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bench {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}
#define BENCH_CUDA(call) bench::check(call, #call)

static __device__ uint64_t mix(uint64_t z) {  // splitmix64
  z += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// E4M3 of normal values whose largest is near 448, as quantized normal data is.
static __global__ void fill(uint8_t* data, int64_t size, uint64_t seed) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += stride) {
    const uint64_t bits = mix(mix(seed) + i);
    const float u = (static_cast<uint32_t>(bits) >> 8) * 0x1p-24f + 0x1p-25f;
    const float angle = static_cast<uint32_t>(bits >> 32) * 0x1p-31f;  // In units of pi.
    const float value = 80.0f * sqrtf(-2.0f * logf(u)) * cospif(angle);
    const float magnitude = fminf(fabsf(value), 448.0f);
    // Rounded to 3 bits of mantissa; exponent bias 127 to 7; what would be subnormal becomes 0.
    const int code = static_cast<int>((__float_as_uint(magnitude) + 0x80000) >> 20) - (120 << 3);
    data[i] = static_cast<uint8_t>(code < 8 ? 0 : code) | (value < 0.0f ? 0x80 : 0);
  }
}

static __global__ void spin(int64_t nanoseconds) {
  int64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
}

// Four vectors a thread, a block's side by side.
static __global__ void copy(const uint4* from, uint4* to, int64_t count) {
  const int64_t first = int64_t{blockIdx.x} * 4 * blockDim.x + threadIdx.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = first + i * int64_t{blockDim.x};
    if (at < count) to[at] = from[at];
  }
}

// bf16 elements that are NaN.
static __global__ void count_nan(const uint16_t* data, int64_t size, unsigned long long* count) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += stride) {
    if ((data[i] & 0x7fff) > 0x7f80) atomicAdd(count, 1ull);
  }
}

// Freed at the end, whatever happens.
class Memory {
 public:
  explicit Memory(size_t bytes) { BENCH_CUDA(cudaMalloc(&data_, bytes)); }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ~Memory() { cudaFree(data_); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

struct Timing {
  float us, us_min, us_iqr;
};

constexpr int kPairs = 15;

// A stream with the two events that time what runs on it.
class Stopwatch {
 public:
  // What it times starts behind a kernel of so many nanoseconds.
  explicit Stopwatch(int64_t head_start_ns) : head_start_ns_(head_start_ns) {
    BENCH_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (cudaEvent_t& mark : marks_) BENCH_CUDA(cudaEventCreate(&mark));
  }
  ~Stopwatch() {
    for (const cudaEvent_t mark : marks_) cudaEventDestroy(mark);
    cudaStreamDestroy(stream_);
  }
  Stopwatch(const Stopwatch&) = delete;

  cudaStream_t stream() const { return stream_; }

  // Microseconds of a graph, launched while a kernel keeps the device busy.
  float replay(cudaGraphExec_t exec) const {
    begin();
    mark(0);
    BENCH_CUDA(cudaGraphLaunch(exec, stream_));
    mark(1);
    BENCH_CUDA(cudaEventSynchronize(marks_[1]));
    return between(0);
  }

  // Of two graphs, one behind the other, and both right behind `leads` runs of both: what comes
  // first after a pause, or after another process, takes another time than what follows.
  std::pair<float, float> replay(cudaGraphExec_t first, cudaGraphExec_t second, int leads) const {
    begin();
    for (int i = 0; i < leads; ++i) {
      BENCH_CUDA(cudaGraphLaunch(first, stream_));
      BENCH_CUDA(cudaGraphLaunch(second, stream_));
    }
    mark(0);
    BENCH_CUDA(cudaGraphLaunch(first, stream_));
    mark(1);
    BENCH_CUDA(cudaGraphLaunch(second, stream_));
    mark(2);
    BENCH_CUDA(cudaEventSynchronize(marks_[2]));
    return {between(0), between(1)};
  }

 private:
  void begin() const {
    spin<<<1, 1, 0, stream_>>>(head_start_ns_);
    BENCH_CUDA(cudaGetLastError());
  }
  void mark(int i) const { BENCH_CUDA(cudaEventRecord(marks_[i], stream_)); }
  float between(int i) const {
    float ms = 0;
    BENCH_CUDA(cudaEventElapsedTime(&ms, marks_[i], marks_[i + 1]));
    return 1e3f * ms;
  }

  int64_t head_start_ns_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t marks_[3] = {};
};

// The calls call(0) ... call(calls - 1), which throw what fails, captured into one graph.
class Chain {
 public:
  template <typename Call>
  Chain(const Stopwatch& watch, int calls, Call call) : watch_(watch) {
    BENCH_CUDA(cudaStreamBeginCapture(watch.stream(), cudaStreamCaptureModeThreadLocal));
    try {
      for (int i = 0; i < calls; ++i) call(i);
    } catch (...) {  // The capture must end, or the stream could not be used again.
      if (cudaStreamEndCapture(watch.stream(), &graph_) == cudaSuccess) cudaGraphDestroy(graph_);
      throw;
    }
    BENCH_CUDA(cudaStreamEndCapture(watch.stream(), &graph_));
    BENCH_CUDA(cudaGraphInstantiate(&exec_, graph_, 0));
    BENCH_CUDA(cudaGraphUpload(exec_, watch.stream()));
  }
  ~Chain() {
    cudaGraphExecDestroy(exec_);
    cudaGraphDestroy(graph_);
  }
  Chain(const Chain&) = delete;

  float replay() const { return watch_.replay(exec_); }
  // Of this one and, right behind it, of another; both right behind `leads` runs of both.
  std::pair<float, float> replay(const Chain& next, int leads = 1) const {
    return watch_.replay(exec_, next.exec_, leads);
  }

 private:
  const Stopwatch& watch_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

// Microseconds of a call, (t(2n) - t(n)) / n.
template <typename Call>
Timing time_calls(const Stopwatch& watch, int calls, Call call) {
  const Chain once(watch, calls, call), twice(watch, 2 * calls, call);
  for (int i = 0; i < 2; ++i) once.replay(twice);
  std::vector<float> each;
  float low = 1e30f, low_twice = 1e30f;
  for (int i = 0; i < kPairs; ++i) {
    const auto [a, b] = once.replay(twice);
    low = std::min(low, a);
    low_twice = std::min(low_twice, b);
    each.push_back((b - a) / calls);
  }
  std::sort(each.begin(), each.end());
  return {each[kPairs / 2], (low_twice - low) / calls, each[kPairs * 3 / 4] - each[kPairs / 4]};
}

}  // namespace bench
