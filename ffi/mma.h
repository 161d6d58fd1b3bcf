// Tensor cores of 16 bits, and FP8 codes brought into their types. Device code, for all GPUs from
// 7.5 on.
#pragma once

#include "ffi/fp8.h"

namespace jax_fp8 {

// --- Decoding ------------------------------------------------------------------------------------

// Codes in the upper bytes of the two halves to values of the 16-bit type of the product, exactly.
//
// The bits move to where that type has exponent and mantissa, and a multiplication by a power of
// two mends the exponent's bias, of subnormal numbers too. The largest exponent of the code, which
// NaN and infinity have, is then not yet that of the type: adding one to it carries into a bit that
// the others leave free, from which the missing bits follow.
template <Type mma>
__device__ uint32_t spread(uint32_t codes, bool e4m3) {
  const uint32_t magnitude = codes & 0x7f007f00u, sign = codes & 0x80008000u;
  if constexpr (mma == Type::kF16) {
    uint32_t bits = magnitude >> 1;
    bits |= (bits + 0x00800080u) & 0x40004000u;
    const __half2 factor = __half2half2(__ushort_as_half(0x5c00));  // 2^8
    const __half2_raw scaled = __hmul2(*reinterpret_cast<const __half2*>(&bits), factor);
    const uint32_t value = scaled.x | static_cast<uint32_t>(scaled.y) << 16;
    return e4m3 ? value | sign : codes;  // E5M2 is the upper half of float16.
  } else {
#if __CUDA_ARCH__ >= 800
    uint32_t bits = e4m3 ? magnitude >> 4 : magnitude >> 3;
    const uint32_t carry =
        e4m3 ? (bits + 0x00100010u) & 0x08000800u : (bits + 0x00800080u) & 0x10001000u;
    bits |= carry * (e4m3 ? 15 : 7);
    const auto factor =
        __bfloat162bfloat162(__ushort_as_bfloat16(e4m3 ? 0x7b80 : 0x7780));  // 2^120, 2^112
    const __nv_bfloat162_raw scaled =
        __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&bits), factor);
    return scaled.x | static_cast<uint32_t>(scaled.y) << 16 | sign;
#else
    return 0;  // Turing has no bfloat16, which decode_refusal says.
#endif
  }
}

// Four codes to four values, in their order. `e4m3` is the same for all threads, and most often
// known when the kernel is compiled.
template <Type mma>
__device__ uint2 decode_word(uint32_t codes, bool e4m3) {
  const uint32_t low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);
#if __CUDA_ARCH__ >= 890
  if constexpr (mma == Type::kF16) {
    if (!e4m3) return make_uint2(low, high);  // E5M2 is the upper half of float16.
    const auto pair = [](uint32_t two) -> uint32_t {
      const __half2_raw halves =
          __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
      return halves.x | static_cast<uint32_t>(halves.y) << 16;
    };
    return make_uint2(pair(codes & 0xffffu), pair(codes >> 16));
  }
#endif
  return make_uint2(spread<mma>(low, e4m3), spread<mma>(high, e4m3));
}

// --- Instructions --------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, or zeros in their place, to be there after wait_for_copies.
__device__ inline void copy_bytes(uint8_t* target, const uint8_t* source, bool zero) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(zero ? 0 : 16));
#else
  *reinterpret_cast<uint4*>(target) = zero ? uint4{} : *reinterpret_cast<const uint4*>(source);
#endif
}

__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ inline void load_matrices(uint32_t (&r)[4], const uint8_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

template <Type mma>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (mma == Type::kBF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    return;
  }
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // Turing has half of it: the registers of the two halves along K are the same.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
      " {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
      " {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

}  // namespace jax_fp8
