// What the kernels of the fused producers share: how values come about, packs of them, reductions
// in one order, scales.
#pragma once

#include <algorithm>

#include "ffi/fused.h"
#include "ffi/pack.h"

namespace jax_fp8::fused {

constexpr int kWidth = 8;  // Values of a pack, which one thread holds.
constexpr int kWarp = 32;
constexpr int kStrip = 128 / kWidth;  // Packs, and so lanes, of a (1, 128) block.

// What a launch does with the values of a row.
enum class Pass : int {
  kGiven,   // Casts them with scales that are given.
  kRow,     // Takes the scale from the row itself, and casts.
  kStrips,  // The same for each (1, 128) block.
  kAmax,    // Takes the row into the amax of its tensor.
  kTensor,  // Casts, with the scale from that amax.
  kTwice,   // These two, in one launch whose blocks wait for each other between them.
  kHeld,    // The same of rows that are all in registers at once, and so are read once.
};

// --- Producers: how values come about of what is read ---

template <bool centered, bool residual>
struct Norm {
  static constexpr bool kNorm = true, kCentered = centered, kResidual = residual;
  static constexpr int kParts = 1;  // Values of x for each one of the result.
  using AfterSum = Norm<centered, false>;
  __device__ static float value(float x, float) { return x; }
};

struct Swiglu {
  static constexpr bool kNorm = false, kCentered = false, kResidual = false;
  static constexpr int kParts = 2;
  using AfterSum = Swiglu;
  __device__ static float value(float gate, float up) { return silu(gate) * up; }
};

struct Gelu {
  static constexpr bool kNorm = false, kCentered = false, kResidual = false;
  static constexpr int kParts = 1;
  using AfterSum = Gelu;
  __device__ static float value(float x, float) { return gelu(x); }
};

// --- Packs of values ---

// Zeros from `count` on. Wide: `count` is kWidth or not positive, and addresses are aligned.
template <bool wide, Type type>
__device__ inline void load_pack(const void* data, int64_t index, int count,
                                 Pack<type, kWidth>& pack) {
  const auto* source = static_cast<const typename Native<type>::type*>(data) + index;
#pragma unroll
  for (uint32_t& word : pack.words) word = 0;
  if constexpr (wide) {
    if (count > 0) pack.load(source);
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (e >= count) continue;
      Pack<type, 1> one;
      one.load(source + e);
      if constexpr (type == Type::kF32) {
        pack.words[e] = one.words[0];
      } else {
        pack.words[e / 2] |= one.words[0] << (e % 2 * 16);
      }
    }
  }
}

template <Type type>
__device__ inline void store_pack(typename Native<type>::type* target,
                                  const Pack<type, kWidth>& pack) {
#pragma unroll
  for (int i = 0; i < pack.kBytes / 16; ++i) {
    const uint32_t* words = pack.words + 4 * i;
    reinterpret_cast<uint4*>(target)[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Rounds to the type.
template <Type type>
__device__ inline Pack<type, kWidth> make_pack(const float (&values)[kWidth]) {
  Pack<type, kWidth> pack;
  if constexpr (type == Type::kF32) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) pack.words[e] = float_bits(values[e]);
  } else {
    using T = typename Native<type>::type;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      const T pair[2] = {Native<type>::store(values[2 * i]),
                         Native<type>::store(values[2 * i + 1])};
      pack.words[i] = *reinterpret_cast<const uint16_t*>(pair) |
                      static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(pair + 1)) << 16;
    }
  }
  return pack;
}

// Weights, whose type is known at run time alone unless it is said to be `known`.
template <bool wide, bool is_known, Type known>
__device__ inline void load_weights(const void* data, Type type, int64_t index, int count,
                                    float (&values)[kWidth]) {
  const auto load = [&](auto pack) {
    load_pack<wide>(data, index, count, pack);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) values[e] = pack[e];
  };
  if (is_known) {
    load(Pack<known, kWidth>());
  } else if (type == Type::kBF16) {
    load(Pack<Type::kBF16, kWidth>());
  } else if (type == Type::kF16) {
    load(Pack<Type::kF16, kWidth>());
  } else {
    load(Pack<Type::kF32, kWidth>());
  }
}

// As quantize_value. Where the scale comes of the values themselves, it is NaN unless all of them
// are finite, and nothing is to be done about infinities.
template <Type out, bool given>
__device__ inline void store_codes(uint8_t* data, const float (&values)[kWidth], float inverse) {
  if constexpr (given) {
    store_quantized<out, kWidth>(data, values, inverse);
  } else {
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* four = values + 4 * i;
      words[i] = encode_pair<out>(four[0] * inverse, four[1] * inverse) |
                 encode_pair<out>(four[2] * inverse, four[3] * inverse) << 16;
    }
    *reinterpret_cast<uint2*>(data) = make_uint2(words[0], words[1]);
  }
}

__device__ inline void store_codes(const Fused& f, int64_t index, const float (&values)[kWidth],
                                   float inverse) {
  uint8_t* const data = f.data + index;
  if (f.data_type == Type::kE4M3) {
    f.given == nullptr ? store_codes<Type::kE4M3, false>(data, values, inverse)
                       : store_codes<Type::kE4M3, true>(data, values, inverse);
  } else {
    f.given == nullptr ? store_codes<Type::kE5M2, false>(data, values, inverse)
                       : store_codes<Type::kE5M2, true>(data, values, inverse);
  }
}

__device__ inline void store_code(const Fused& f, int64_t index, float value, float inverse) {
  f.data[index] = f.data_type == Type::kE4M3 ? quantize_value<Type::kE4M3>(value, inverse)
                                             : quantize_value<Type::kE5M2>(value, inverse);
}

// Of a row, when it does not come from the row itself.
__device__ inline float known_scale(const Fused& f, Pass pass, int64_t entry, int64_t row) {
  if (pass == Pass::kTensor) return dynamic_scale(f.amax[entry], f.data_type);
  return f.given[f.block_rows == 0 ? entry : row];
}

__device__ inline void store_scale(const Fused& f, int64_t entry, int64_t row, float scale) {
  if (f.block_rows != 0) {
    f.scale[row] = scale;
  } else if (row == entry * f.rows) {
    f.scale[entry] = scale;
  }
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// The larger magnitude; NaN where there is one.
struct Larger {
  __device__ float operator()(float a, float b) const {
#if __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(fabsf(a)), "f"(fabsf(b)));
    return result;
#else
    return bits_float(max(magnitude(a), magnitude(b)));
#endif
  }
};

// term(0) to term(7), as a tree.
template <typename Combine, typename Term>
__device__ inline float combine_pack(Combine combine, Term term) {
  float terms[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) terms[e] = term(e);
#pragma unroll
  for (int half = kWidth / 2; half > 0; half /= 2) {
#pragma unroll
    for (int e = 0; e < half; ++e) terms[e] = combine(terms[e], terms[e + half]);
  }
  return terms[0];
}

// --- Sums and maxima over a row ---

// A row is added up in one order, which follows from its length alone: each pack as a tree, the 32
// packs of a group as a tree, groups 32 apart one after the other, and these 32 sums as a tree. So
// neither other dimensions nor addresses change a bit.
constexpr int kMaxGroups = 128;

// `groups` sums, one for each group, in `parts`; up to `most` times 32 of them.
template <int most>
__device__ inline float combine_groups(const float* parts, int groups) {
  const int lane = threadIdx.x % kWarp;
  float sums[1] = {lane < groups ? parts[lane] : 0.0f};
#pragma unroll
  for (int i = 1; i < most; ++i) {
    if (lane + i * kWarp < groups) sums[0] += parts[lane + i * kWarp];
  }
  return lanes_combine<kWarp>(sums, Add());
}

// The largest magnitude of those that the threads of a row have, in each of them: `put_amax`, then
// __syncthreads, then `get_amax` with what it was put in.
__device__ inline void put_amax(float amax, uint32_t* parts) {
  const uint32_t bits = lanes_max<kWarp>(float_bits(amax));
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = bits;
}

__device__ inline float get_amax(const uint32_t* parts) {
  const unsigned lane = threadIdx.x % kWarp;
  return bits_float(lanes_max<kWarp>(lane < blockDim.x / kWarp ? parts[lane] : 0));
}

__device__ inline void amax_to_memory(const Fused& f, int64_t entry, float amax) {
  // Most rows have less than is already there, and one place takes one atomic at a time.
  auto* const all = reinterpret_cast<uint32_t*>(f.amax) + entry;
  const uint32_t bits = float_bits(amax);
  if (bits > *const_cast<volatile uint32_t*>(all)) atomicMax(all, bits);
}

// --- Norms ---

template <bool wide, bool is_known, Type known>
__device__ inline void shift_and_scale(const Fused& f, int64_t index, int count, float mean,
                                       float factor, float (&values)[kWidth]) {
  float weights[kWidth], biases[kWidth];
  load_weights<wide, is_known, known>(f.weight, f.weight_type, index, count, weights);
  load_weights<wide, is_known, known>(f.bias, f.bias_type, index, count, biases);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    values[e] = __fmaf_rn(__fmul_rn(values[e] - mean, weights[e]), factor, biases[e]);
  }
}

template <typename Producer>
__device__ inline float pack_moment(const float (&values)[kWidth], float mean, int count) {
  const auto term = [&](int e) {
    return !Producer::kCentered ? values[e] : e < count ? values[e] - mean : 0.0f;
  };
  float terms[kWidth / 2];
#pragma unroll
  for (int e = 0; e < kWidth / 2; ++e) {
    const float one = term(e), other = term(e + kWidth / 2);
    terms[e] = __fmaf_rn(one, one, __fmul_rn(other, other));
  }
  return (terms[0] + terms[2]) + (terms[1] + terms[3]);
}

__device__ inline float pack_total(const float (&values)[kWidth]) {
  return combine_pack(Add(), [&](int e) { return values[e]; });
}

__device__ inline float pack_amax(const float (&values)[kWidth]) {
  return combine_pack(Larger(), [&](int e) { return values[e]; });
}

// --- GELU ---

// The largest magnitude among `so_far` and what GELU makes of 16-bit values. Above zero it grows
// with the value, and by more from one to the next than its rounding errors, so that there only the
// largest is asked. Below zero it stays under 0.171, which `so_far`, if it is of other values of
// the same tensor, mostly exceeds; the smallest is asked, for infinities and NaN.
template <Type in, int packs>
__device__ inline float gelu_amax(const Pack<in, kWidth> (&read)[packs], float so_far) {
  static_assert(sizeof(typename Native<in>::type) == 2);
  uint32_t largest = read[0].words[0], smallest = largest;  // In halves, as bits.
#pragma unroll
  for (int p = 0; p < packs; ++p) {
#pragma unroll
    for (const uint32_t word : read[p].words) {
      largest = __vmaxs2(largest, word);
      smallest = __vmaxu2(smallest, word);
    }
  }
  Pack<in, 4> ends;
  ends.words[0] = largest, ends.words[1] = smallest;
  float amax = so_far;
#pragma unroll
  for (int e = 0; e < 4; ++e) amax = Larger()(amax, gelu(ends[e]));
  if (amax >= 0.171f) return amax;
#pragma unroll
  for (int p = 0; p < packs; ++p) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) amax = Larger()(amax, gelu(read[p][e]));
  }
  return amax;
}

// What is left to do after a pass that has added the residual.
__host__ __device__ inline Fused after_sum(Fused f) {
  if (f.residual != nullptr) {
    f.x = f.sum;
    f.residual = nullptr;
    f.sum = nullptr;
  }
  return f;
}

// --- Launches ---

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;  // Null is.
}

// Whether rows are made of whole packs at aligned addresses.
inline bool is_wide(const Fused& f) {
  return f.cols % kWidth == 0 && aligned(f.x, 16) && aligned(f.residual, 16) &&
         aligned(f.sum, 16) && aligned(f.weight, 16) && aligned(f.bias, 16) && aligned(f.data, 8);
}

template <typename P, Type type>
struct Kind {
  using Producer = P;
  static constexpr Type in = type;
};

// Calls `run` with the Kind of f.
template <typename Run>
cudaError_t with_kind(const Fused& f, Run run) {
  const auto with_type = [&](auto producer) {
    using P = decltype(producer);
    if (f.x_type == Type::kBF16) return run(Kind<P, Type::kBF16>());
    if (f.x_type == Type::kF16) return run(Kind<P, Type::kF16>());
    return run(Kind<P, Type::kF32>());
  };
  switch (f.producer) {
    case Producer::kRmsNorm:
      return f.residual == nullptr ? with_type(Norm<false, false>())
                                   : with_type(Norm<false, true>());
    case Producer::kLayerNorm:
      return f.residual == nullptr ? with_type(Norm<true, false>()) : with_type(Norm<true, true>());
    case Producer::kSwiglu:
      return with_type(Swiglu());
    default:
      return with_type(Gelu());
  }
}

// For rows of whole packs that one thread block holds: whether it was one, and if so, launched.
bool launch_rows(const Fused& f, Pass pass, cudaStream_t stream, cudaError_t* error);
cudaError_t launch_general(const Fused& f, Pass pass, cudaStream_t stream);

}  // namespace jax_fp8::fused
