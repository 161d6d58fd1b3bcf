// How the rows of a fused producer are spread over the device, and launched.
#include "ffi/device.h"
#include "ffi/fused_rows_kernel.h"
#include "ffi/zero.h"

namespace jax_fp8::fused {
namespace {

// How rows are spread in row_kernel: `packs` for each of `threads`, in `parts` along y.
struct Spread {
  int packs, threads, parts;
  int rows() const { return std::max(1, 128 / threads); }  // Of a block.
};

using Kernel = void (*)(Fused, Pass, Kept);

// Thread blocks that run at once, with so many bytes of dynamic shared memory.
cudaError_t blocks_at_once(Kernel kernel, const Spread& spread, int64_t bytes, int64_t* blocks) {
  int resident = 0, processors = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &resident, kernel, spread.threads * spread.rows(), static_cast<size_t>(bytes));
  if (error != cudaSuccess) return error;
  const cudaError_t asked = device_attribute(cudaDevAttrMultiProcessorCount, &processors);
  *blocks = int64_t{resident} * processors;
  return asked;
}

cudaError_t launch(Kernel kernel, const Fused& f, Pass pass, const Spread& spread,
                   cudaStream_t stream) {
  int64_t most = 0;
  const cudaError_t error = blocks_at_once(kernel, spread, 0, &most);
  if (error != cudaSuccess) return error;
  most = std::max<int64_t>(1, most / spread.parts);
  // No more than run at once: a last few would take as long as all the others. But where a sum is
  // written too, and there are many, memory is 5 % faster when each has its own.
  int64_t blocks = ceil_div(f.batch * f.rows, spread.rows());
  if (f.residual == nullptr || blocks <= 4 * most) blocks = std::min(blocks, most);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(spread.parts));
  const dim3 block(spread.threads, spread.rows());
  return launch_kernel(kernel, f.follows, grid, block, 0, stream, f, pass, Kept{});
}

// One launch whose blocks wait for each other, so that all must run at once.
cudaError_t launch_together(Kernel kernel, Fused f, Pass pass, const Spread& spread, int64_t blocks,
                            Kept kept, int64_t bytes, cudaStream_t stream) {
  void* arguments[] = {&f, &pass, &kept};
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(spread.parts));
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid,
                                     dim3(spread.threads, spread.rows()), arguments,
                                     static_cast<size_t>(bytes), stream);
}

// Dynamic tensor scales of regular rows, one for each block. kHeld where all rows run at once; else
// kTwice, with as many rows kept as shared memory has room for. cudaErrorNotSupported: too many
// rows to keep their norms, or rows too long for all of their blocks to run at once.
template <typename Producer, Type in, int packs>
cudaError_t launch_tensor(const Fused& f, const Spread& spread, cudaStream_t stream) {
  const Kernel held = row_kernel<Producer, in, packs, true, Pass::kHeld>;
  const Kernel twice = row_kernel<Producer, in, packs, true, Pass::kTwice>;
  int64_t most = 0;
  cudaError_t error = blocks_at_once(held, spread, 0, &most);
  if (error != cudaSuccess) return error;
  if (f.rows * spread.parts <= most) {
    return launch_together(held, f, Pass::kHeld, spread, f.rows, Kept{}, 0, stream);
  }
  error = blocks_at_once(twice, spread, 0, &most);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min(f.rows, most / spread.parts);
  if (blocks == 0) return cudaErrorNotSupported;
  int processors = 0, of_block = 0, of_processor = 0;  // Shared memory that each may have.
  error = device_attribute(cudaDevAttrMultiProcessorCount, &processors);
  if (error == cudaSuccess) {
    error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &of_block);
  }
  if (error == cudaSuccess) {
    error = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &of_processor);
  }
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, twice);
  if (error != cudaSuccess) return error;
  const int64_t room = of_block - static_cast<int64_t>(attributes.sharedSizeBytes);
  error = cudaFuncSetAttribute(twice, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(room));  // The same for all calls.
  if (error != cudaSuccess) return error;
  const int64_t turns = ceil_div(f.rows, blocks);
  const int64_t of_norms = Producer::kNorm ? turns * int64_t{sizeof(float2)} : 0;
  const int64_t norms = ceil_div(of_norms, 16) * 16;
  const int64_t of_turn =
      int64_t{sizeof(Pack<in, kWidth>)} * packs * Producer::kParts * spread.threads;
  // As many as leave all blocks running at once: a little less than the share of each of a
  // multiprocessor's.
  const int64_t resident = ceil_div(blocks * spread.parts, processors);
  const int64_t share = std::min(room, of_processor / resident);
  for (int64_t kept = std::min(turns, (share - norms) / of_turn); norms <= room && kept >= 0;
       --kept) {
    const int64_t bytes = norms + kept * of_turn;
    int64_t fitting = 0;
    error = blocks_at_once(twice, spread, bytes, &fitting);
    if (error != cudaSuccess) return error;
    if (fitting < blocks * spread.parts) continue;
    return launch_together(twice, f, Pass::kTwice, spread, blocks,
                           {static_cast<int>(kept), static_cast<int>(norms)}, bytes, stream);
  }
  return cudaErrorNotSupported;
}

template <typename Producer, Type in, int packs>
cudaError_t launch_regular(const Fused& f, Pass pass, const Spread& spread, cudaStream_t stream) {
  switch (pass) {
    case Pass::kGiven:
      return launch(row_kernel<Producer, in, packs, true, Pass::kGiven>, f, pass, spread, stream);
    case Pass::kRow:
      return launch(row_kernel<Producer, in, packs, true, Pass::kRow>, f, pass, spread, stream);
    default:
      return launch(row_kernel<Producer, in, packs, true, Pass::kStrips>, f, pass, spread, stream);
  }
}

// Rows that are not regular. Of their dynamic tensor scales those of few rows take one launch, the
// others three.
template <typename Producer, Type in, int packs>
cudaError_t launch_any(const Fused& f, Pass pass, const Spread& spread, cudaStream_t stream) {
  const Kernel kernel = row_kernel<Producer, in, packs, false, Pass::kRow>;  // Of any pass.
  if (pass != Pass::kTwice) return launch(kernel, f, pass, spread, stream);
  cudaError_t error = cudaSuccess;
  if constexpr (packs == 1) {
    const Kernel held = row_kernel<Producer, in, 1, false, Pass::kHeld>;
    int64_t most = 0;
    error = blocks_at_once(held, spread, 0, &most);
    if (error != cudaSuccess) return error;
    const int64_t blocks = ceil_div(f.batch * f.rows, spread.rows());
    if (blocks * spread.parts <= most) {
      return launch_together(held, f, Pass::kHeld, spread, blocks, Kept{}, 0, stream);
    }
  }
  error = zero_words(f.amax, f.batch, stream);
  if (error == cudaSuccess) error = launch(kernel, f, Pass::kAmax, spread, stream);
  if (error != cudaSuccess) return error;
  return f.residual == nullptr
             ? launch(kernel, f, Pass::kTensor, spread, stream)
             : launch(row_kernel<typename Producer::AfterSum, in, packs, false, Pass::kRow>,
                      after_sum(f), Pass::kTensor, spread, stream);
}

// Few rows are spread over as many threads as there are packs; many give each thread several, so
// that reductions and scales are shared by more values.
Spread spread_of(const Fused& f, bool whole_rows, int many) {
  const int64_t count = ceil_div(f.cols, kWidth);
  const bool few = f.batch * f.rows * count <= 132 * 2048;
  const int packs = few && (!whole_rows || count <= 1024) ? 1 : many;
  const int64_t parts = whole_rows ? 1 : std::max<int64_t>(1, ceil_div(count, 256 * packs));
  const int64_t threads = ceil_div(ceil_div(count, packs * parts), kWarp) * kWarp;
  return {packs, static_cast<int>(std::max<int64_t>(threads, kWarp)), static_cast<int>(parts)};
}

// As of row_kernel.
template <Type in>
bool is_regular(const Fused& f, const Spread& spread) {
  return f.batch == 1 && spread.packs > 1 && spread.threads >= 128 &&
         f.cols == int64_t{spread.packs} * spread.threads * spread.parts * kWidth &&
         f.data_type == Type::kE4M3 && (f.weight == nullptr || f.weight_type == in) &&
         (f.bias == nullptr || f.bias_type == in);
}

template <typename Producer, Type in>
bool run(const Fused& f, Pass pass, cudaStream_t stream, cudaError_t* error) {
  if (!is_wide(f) || f.cols >= 1 << 24 || f.batch * f.rows >= 1 << 30) return false;
  const bool whole_rows = Producer::kNorm || pass == Pass::kRow;
  const auto fits = [](const Spread& spread) {
    return spread.threads <= most_threads<Producer>(spread.packs);
  };
  // Of float32 there are twice the bytes to wait for: instructions count less.
  if constexpr (in != Type::kF32) {
    // LayerNorm has two sums, which four packs a thread share.
    constexpr int usual = Producer::kCentered && !Producer::kResidual ? 4 : 2;
    const Spread spread = spread_of(f, whole_rows, usual);
    if (pass != Pass::kTwice && is_regular<in>(f, spread) && fits(spread)) {
      *error = launch_regular<Producer, in, usual>(f, pass, spread, stream);
      return true;
    }
  }
  if constexpr (in == Type::kBF16) {  // What models have: each type more is a megabyte of kernels.
    const Spread spread = spread_of(f, whole_rows, 2);
    if (pass == Pass::kTwice && is_regular<in>(f, spread) && fits(spread)) {
      *error = launch_tensor<Producer, in, 2>(f, spread, stream);
      if (*error != cudaErrorNotSupported) return true;
    }
  }
  // As many as fit into the registers of a thread, for rows as long as can be.
  constexpr bool twice = Producer::kResidual || Producer::kParts == 2 || in == Type::kF32;
  constexpr int many = twice ? 2 : 4;
  const Spread spread = spread_of(f, whole_rows, many);
  if (!fits(spread)) return false;
  *error = spread.packs == 1 ? launch_any<Producer, in, 1>(f, pass, spread, stream)
                             : launch_any<Producer, in, many>(f, pass, spread, stream);
  return true;
}

}  // namespace

bool launch_rows(const Fused& f, Pass pass, cudaStream_t stream, cudaError_t* error) {
  bool launched = false;
  with_kind(f, [&](auto kind) {
    using K = decltype(kind);
    launched = run<typename K::Producer, K::in>(f, pass, stream, error);
    return cudaSuccess;
  });
  return launched;
}

}  // namespace jax_fp8::fused
