#include <algorithm>
#include <type_traits>

#include "ffi/naive.h"

namespace jax_fp8 {
namespace {

constexpr int kTileN = 32, kTileM = 8;

template <Type type>
using Constant = std::integral_constant<Type, type>;

// Calls body(x type, w type), each as a Constant.
template <typename Body>
void for_types(Type x, Type w, Body body) {
  const auto with_x = [&](auto x_type) {
    w == Type::kE4M3 ? body(x_type, Constant<Type::kE4M3>{})
                     : body(x_type, Constant<Type::kE5M2>{});
  };
  switch (x) {
    case Type::kE4M3:
      return with_x(Constant<Type::kE4M3>{});
    case Type::kE5M2:
      return with_x(Constant<Type::kE5M2>{});
    case Type::kBF16:
      return with_x(Constant<Type::kBF16>{});
    case Type::kF16:
      return with_x(Constant<Type::kF16>{});
    case Type::kF32:  // Refused by the handler.
      return;
  }
}

template <Type type>
struct Decode {
  __host__ __device__ float operator()(const uint8_t* data, int64_t i) const {
    if constexpr (is_fp8(type)) {
      return decode<type>(data[i]);
    } else {
      return load_as_float(data, type, i);
    }
  }
};

// 256 values, against a conversion for each of the 2 M N K codes.
template <Type type>
struct Table {
  float values[256];
  Table() {
    for (int code = 0; code < 256; ++code) values[code] = decode<type>(static_cast<uint8_t>(code));
  }
  __host__ __device__ float operator()(const uint8_t* data, int64_t i) const {
    return values[data[i]];
  }
};
template <Type type>
using HostDecode = std::conditional_t<is_fp8(type), Table<type>, Decode<type>>;

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
    const HostDecode<decltype(x)::value> decode_x;
    const HostDecode<decltype(w)::value> decode_w;
    float amax = 0.0f;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t m = 0; m < p.m; ++m) {
        for (int64_t n = 0; n < p.n; ++n) {
          const float value = naive_element(p, b, m, n, decode_x, decode_w);
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
