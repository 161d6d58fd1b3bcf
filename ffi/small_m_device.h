// What small_m.cu and gemv.cu need of the device: loads and copies, decoding, the tensor cores.
#pragma once

#include <cuda.h>

#include "ffi/fp8.h"

namespace jax_fp8 {
namespace {

// How many thread blocks share the K of a tile, of which each has a round of `round_k` at least: as
// many as take three quarters of the device, for clusters that need nearly all of it do not find
// room at once (1 x 1024 x 4096 took 7.6 us instead of 5.1). Whatever the batch, so that the bits
// of its entries are those of each by itself.
inline int splits_of(int64_t tiles, int64_t processors, int64_t k, int64_t round_k, int most) {
  const int64_t room = processors * 3 / 4;
  int splits = 1;
  while (2 * splits <= most && tiles * 2 * splits <= room && round_k * 2 * splits <= k) {
    splits *= 2;
  }
  return splits;
}

}  // namespace
}  // namespace jax_fp8

#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
namespace jax_fp8 {
namespace {

// --- Loads, copies into shared memory, and the barriers that these arrive at ---------------------

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ void wait_for(uint64_t* barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// Orders what threads did in shared memory before the box copies that follow a barrier.
__device__ void fence_boxes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ void copy_box(void* target, const CUtensorMap& map, int column, int row, int batch,
                         uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(target)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(batch), "l"(policy)
      : "memory");
}

// 16 bytes into shared memory, to be there after wait_for_packs.
__device__ void copy_pack(uint4* target, const uint4* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)),
               "l"(source)
               : "memory");
}

__device__ void wait_for_packs() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 16 bytes, by way of L1. Not `nc`: a kernel that starts early runs while they are written.
__device__ uint4 load_often(const uint8_t* source) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source));
  return v;
}

// 16 bytes, without a place in L1.
__device__ uint4 load_once(const uint8_t* source, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source), "l"(policy));
  return v;
}

__device__ uint64_t policy_read_once() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}

__device__ uint64_t policy_read_often() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
  return policy;
}

// --- Decoding and multiplying --------------------------------------------------------------------

__device__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Four codes as two pairs of float16, which holds both formats exactly.
__device__ uint2 decode_to_f16(uint32_t codes, Type type) {
  if (type == Type::kE5M2) {  // The upper half of a float16.
    return {__byte_perm(codes, 0, 0x1404), __byte_perm(codes, 0, 0x3424)};
  }
  uint2 pairs;
  asm("{\n.reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(pairs.x), "=r"(pairs.y)
      : "r"(codes));
  return pairs;
}

// Exact for what comes of a code: a bfloat16 is the upper half of a float.
__device__ uint32_t f16_to_bf16(uint32_t pair) {
  const float2 wide = __half22float2(reinterpret_cast<const __half2&>(pair));
  return __byte_perm(float_bits(wide.x), float_bits(wide.y), 0x7632);
}

template <Type mma>
__device__ uint2 decode_to(uint32_t codes, Type type) {
  const uint2 pairs = decode_to_f16(codes, type);
  if constexpr (mma == Type::kF16) return pairs;
  return {f16_to_bf16(pairs.x), f16_to_bf16(pairs.y)};
}

template <Type mma>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
  if constexpr (mma == Type::kBF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  }
}

// --- Pairs of bfloat16 ---------------------------------------------------------------------------

__device__ float2 floats_of(uint32_t pair) {
  return {bits_float(pair << 16), bits_float(pair & 0xffff0000u)};
}

__device__ float sum_of_squares(const uint4& packed) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = floats_of(word_of(packed, i));
    sum += pair.x * pair.x + pair.y * pair.y;
  }
  return sum;
}

__device__ uint4 multiply_bf16(const uint4& a, const uint4& b) {
  uint4 product;
  const auto* const left = reinterpret_cast<const __nv_bfloat162*>(&a);
  const auto* const right = reinterpret_cast<const __nv_bfloat162*>(&b);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    reinterpret_cast<__nv_bfloat162*>(&product)[i] = __hmul2(left[i], right[i]);
  }
  return product;
}

}  // namespace
}  // namespace jax_fp8
#endif
