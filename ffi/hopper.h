// What Hopper alone has, as functions: barriers in shared memory, the copy engine (TMA) and the
// matrix multiplication of a warpgroup. For files compiled for sm_90a.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "ffi/device.h"
#include "ffi/fp8.h"

namespace jax_fp8::hopper {

// A call can pretend a capability, but there is no code for other devices than these.
inline bool is_device() {
  int major, minor;
  return device_attribute(cudaDevAttrComputeCapabilityMajor, &major) == cudaSuccess &&
         device_attribute(cudaDevAttrComputeCapabilityMinor, &minor) == cudaSuccess && major == 9 &&
         minor == 0;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Barriers ------------------------------------------------------------------------------------

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase last until `bytes` have been copied.
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier that block `rank` of the cluster has at the same address.
__device__ inline void barrier_arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// --- Clusters and warpgroups ---------------------------------------------------------------------

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ inline int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Into the shared memory of block `rank` of the cluster, where this block has `address`.
__device__ inline void store_remote(uint32_t address, int rank, float value) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.f32 [remote], %2;\n"
      "}" ::"r"(address),
      "r"(rank), "f"(value)
      : "memory");
}

// A barrier for some of the block's threads, `id` from 1 on; 0 is that of __syncthreads.
__device__ inline void threads_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void threads_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void store_shared(uint32_t address, const float* values) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}
__device__ inline void add_shared(float* values, uint32_t address) {
  float4 more;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(more.x), "=f"(more.y), "=f"(more.z), "=f"(more.w)
               : "r"(address)
               : "memory");
  values[0] += more.x;
  values[1] += more.y;
  values[2] += more.z;
  values[3] += more.w;
}

__device__ inline void load_words(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// True in one lane of the warp, all of which must call it. Unlike a comparison of lanes it lets the
// compiler keep what that lane does in uniform registers, which TMA reads.
__device__ inline bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

template <int registers>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// --- The copy engine -----------------------------------------------------------------------------

// The box of a three-dimensional array at (x, y, z), innermost first, into shared memory.
__device__ inline void copy_in(uint32_t target, const CUtensorMap& map, uint32_t barrier, int x,
                               int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Fetches the map itself, which the first copy waits for otherwise.
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The same into every block of the cluster in `mask`, at the same addresses.
__device__ inline void copy_in(uint32_t target, const CUtensorMap& map, uint32_t barrier, int x,
                               int y, int z, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(mask)
      : "memory");
}

__device__ inline void copy_out(const CUtensorMap& map, uint32_t source, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(source), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Until all but the last `pending` of this thread's copies out have read their sources.
template <int pending = 0>
__device__ inline void copy_out_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Makes what this thread wrote to shared memory visible to the copy engine.
__device__ inline void copy_out_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- The multiplication --------------------------------------------------------------------------

// Describes K-major rows of 128 bytes in 128-byte swizzle, eight of them to an atom of 1024 bytes.
__device__ inline uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kAtom = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kAtom | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

__device__ inline void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void multiply_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `pending` of the committed groups are still running.
template <int pending>
__device__ inline void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// multiply_add<type>(d, a, b): d (64 x 2 * size of d, f32) += a (64 x 16, in registers) times b
// (16 x the same, described). Asynchronous: neither d nor a may be touched before multiply_wait.
//
// The instruction names each register, so its text is put together from decades of numbers.
#define TEN_NAMES(t)                                                                               \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
#define TEN_SUMS(t)                                                                         \
  "+f"(d[t##0]), "+f"(d[t##1]), "+f"(d[t##2]), "+f"(d[t##3]), "+f"(d[t##4]), "+f"(d[t##5]), \
      "+f"(d[t##6]), "+f"(d[t##7]), "+f"(d[t##8]), "+f"(d[t##9])

#define MULTIPLY_ADD(sums, shape, names, a_names, b_name, ...)                                \
  template <Type type>                                                                        \
  __device__ inline void multiply_add(float (&d)[sums], const uint32_t (&a)[4], uint64_t b) { \
    if constexpr (type == Type::kBF16) {                                                      \
      MULTIPLY_ADD_TYPE("bf16", shape, names, a_names, b_name, __VA_ARGS__);                  \
    } else {                                                                                  \
      MULTIPLY_ADD_TYPE("f16", shape, names, a_names, b_name, __VA_ARGS__);                   \
    }                                                                                         \
  }
#define MULTIPLY_ADD_TYPE(type, shape, names, a_names, b_name, ...)                            \
  asm volatile(                                                                                \
      "{\n"                                                                                    \
      ".reg .pred p;\n"                                                                        \
      "setp.eq.u32 p, 0, 0;\n"                                                                 \
      "wgmma.mma_async.sync.aligned." shape "k16.f32." type "." type " {" names "}, {" a_names \
      "}, " b_name                                                                             \
      ", p, 1, 1, 0;\n"                                                                        \
      "}"                                                                                      \
      : __VA_ARGS__                                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

MULTIPLY_ADD(16, "m64n32", TEN_NAMES() "%10, %11, %12, %13, %14, %15", "%16, %17, %18, %19", "%20",
             TEN_SUMS(), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
             "+f"(d[15]))
MULTIPLY_ADD(32, "m64n64", TEN_NAMES() TEN_NAMES(1) TEN_NAMES(2) "%30, %31", "%32, %33, %34, %35",
             "%36", TEN_SUMS(), TEN_SUMS(1), TEN_SUMS(2), "+f"(d[30]), "+f"(d[31]))
MULTIPLY_ADD(64, "m64n128",
             TEN_NAMES() TEN_NAMES(1) TEN_NAMES(2) TEN_NAMES(3) TEN_NAMES(4)
                 TEN_NAMES(5) "%60, %61, %62, %63",
             "%64, %65, %66, %67", "%68", TEN_SUMS(), TEN_SUMS(1), TEN_SUMS(2), TEN_SUMS(3),
             TEN_SUMS(4), TEN_SUMS(5), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]))
MULTIPLY_ADD(128, "m64n256",
             TEN_NAMES() TEN_NAMES(1) TEN_NAMES(2) TEN_NAMES(3) TEN_NAMES(4) TEN_NAMES(5)
                 TEN_NAMES(6) TEN_NAMES(7) TEN_NAMES(8) TEN_NAMES(9) TEN_NAMES(10)
                     TEN_NAMES(11) "%120, %121, %122, %123, %124, %125, %126, %127",
             "%128, %129, %130, %131", "%132", TEN_SUMS(), TEN_SUMS(1), TEN_SUMS(2), TEN_SUMS(3),
             TEN_SUMS(4), TEN_SUMS(5), TEN_SUMS(6), TEN_SUMS(7), TEN_SUMS(8), TEN_SUMS(9),
             TEN_SUMS(10), TEN_SUMS(11), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]),
             "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]))

// d (64 x 256, f32) = [d +] a (64 x 32 codes) times b (32 codes x 256), both described and in E4M3.
__device__ inline void multiply_codes(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {"
      TEN_NAMES() TEN_NAMES(1) TEN_NAMES(2) TEN_NAMES(3) TEN_NAMES(4) TEN_NAMES(5)
      TEN_NAMES(6) TEN_NAMES(7) TEN_NAMES(8) TEN_NAMES(9) TEN_NAMES(10) TEN_NAMES(11)
      "%120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1;\n"
      "}"
      : TEN_SUMS(), TEN_SUMS(1), TEN_SUMS(2), TEN_SUMS(3), TEN_SUMS(4), TEN_SUMS(5), TEN_SUMS(6),
        TEN_SUMS(7), TEN_SUMS(8), TEN_SUMS(9), TEN_SUMS(10), TEN_SUMS(11), "+f"(d[120]),
        "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]),
        "+f"(d[127])
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

#undef MULTIPLY_ADD_TYPE
#undef MULTIPLY_ADD
#undef TEN_SUMS
#undef TEN_NAMES

// Two values of a 16-bit type, `low` in the lower half.
__device__ inline uint32_t pack(Type type, float low, float high) {
  uint32_t packed;
  if (type == Type::kBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// Four 8x8 matrices of 16-bit elements to shared memory, each transposed: the address is that of
// row lane % 8 of the transposed matrix lane / 8.
__device__ inline void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                        uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

}  // namespace jax_fp8::hopper
