#include <algorithm>
#include <type_traits>

#include "ffi/naive.h"

namespace jax_fp8 {
namespace {

constexpr int kTileN = 32, kTileM = 8;

// Calls body<x type, w type>().
template <typename Body>
auto for_types(Type x, Type w, Body body) {
  using E4M3 = std::integral_constant<Type, Type::kE4M3>;
  using E5M2 = std::integral_constant<Type, Type::kE5M2>;
  if (x == Type::kE4M3) return w == Type::kE4M3 ? body(E4M3{}, E4M3{}) : body(E4M3{}, E5M2{});
  return w == Type::kE4M3 ? body(E5M2{}, E4M3{}) : body(E5M2{}, E5M2{});
}

template <Type type>
struct Decode {
  __host__ __device__ float operator()(uint8_t code) const { return decode<type>(code); }
};

// 256 values, against a conversion for each of the 2 M N K codes.
struct Table {
  float values[256];
  template <Type type>
  static Table of() {
    Table table;
    for (int code = 0; code < 256; ++code) {
      table.values[code] = decode<type>(static_cast<uint8_t>(code));
    }
    return table;
  }
};
struct Lookup {
  const Table& table;
  __host__ __device__ float operator()(uint8_t code) const { return table.values[code]; }
};

template <Type x_type, Type w_type>
__device__ float element(const Product& p, int64_t b, int64_t m, int64_t n) {
  return naive_element(p, b, m, n, Decode<x_type>{}, Decode<w_type>{});
}

template <Type x_type, Type w_type>
__global__ void naive_kernel(Product p, int64_t tiles_n, int64_t tiles_m) {
  const int64_t tile = blockIdx.x;
  const int64_t n = tile % tiles_n * kTileN + threadIdx.x;
  const int64_t m = tile / tiles_n % tiles_m * kTileM + threadIdx.y;
  const int64_t b = tile / tiles_n / tiles_m;
  const bool inside = m < p.m && n < p.n;
  const float value = inside ? element<x_type, w_type>(p, b, m, n) : 0.0f;
  if (inside) store(p, value, (b * p.m + m) * p.n + n);
  if (p.amax != nullptr) amax_to_memory(p.amax, value);
}

template <Type x_type, Type w_type>
__global__ void repair_kernel(Product p) {
  if (isfinite(*p.amax)) return;
  uint8_t* d = static_cast<uint8_t*>(p.d);
  const uint8_t largest = p.d_type == Type::kE4M3 ? 0x7e : 0x7b;
  const int64_t count = p.batch * p.m * p.n;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    if ((d[i] & 0x7f) != largest) continue;
    const int64_t row = i / p.n;
    const float value = element<x_type, w_type>(p, row / p.m, row % p.m, i % p.n);
    if (isinf(value)) d[i] = 0x7f;
  }
}

}  // namespace

cudaError_t naive_device(const Product& p, cudaStream_t stream) {
  const int64_t tiles_n = ceil_div(p.n, kTileN), tiles_m = ceil_div(p.m, kTileM);
  const auto blocks = static_cast<unsigned>(tiles_n * tiles_m * p.batch);
  for_types(p.x.type, p.w.type, [&](auto x, auto w) {
    naive_kernel<decltype(x)::value, decltype(w)::value>
        <<<blocks, dim3(kTileN, kTileM), 0, stream>>>(p, tiles_n, tiles_m);
  });
  return cudaGetLastError();
}

cudaError_t repair_infinities(const Product& p, cudaStream_t stream) {
  for_types(p.x.type, p.w.type, [&](auto x, auto w) {
    repair_kernel<decltype(x)::value, decltype(w)::value><<<512, 256, 0, stream>>>(p);
  });
  return cudaGetLastError();
}

void naive_host(const Product& p) {
  for_types(p.x.type, p.w.type, [&](auto x, auto w) {
    const Table x_table = Table::of<decltype(x)::value>(),
                w_table = Table::of<decltype(w)::value>();
    float amax = 0.0f;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t m = 0; m < p.m; ++m) {
        for (int64_t n = 0; n < p.n; ++n) {
          const float value = naive_element(p, b, m, n, Lookup{x_table}, Lookup{w_table});
          store(p, value, (b * p.m + m) * p.n + n);
          // As integers, where a NaN is the largest.
          amax = bits_float(std::max(float_bits(amax), float_bits(std::fabs(value))));
        }
      }
    }
    if (p.amax != nullptr) *p.amax = amax;
  });
}

}  // namespace jax_fp8
