// Rows in registers: each is read once, while the one before is worked on.
#include "ffi/fused_kernels.h"

namespace jax_fp8::fused {
namespace {

// Threads of a block at most, so that the registers suffice.
template <typename Producer>
constexpr int most_threads(int packs) {
  return packs < 4 ? 1024 : Producer::kCentered ? 768 : 896;
}

// A value that stays in its register: the compiler would rather compute it again than keep it.
__device__ inline float kept(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

// blockDim = (threads of a row, rows of a block), the threads being whole warps. Column c of the
// result is in pack c / 8, which thread pack % blockDim.x has. The blocks along x share the rows;
// those along y, each with columns of its own, are for passes that need not know a row whole.
// While one row is worked on, the next one is on its way into registers.
//
// Regular: one batch entry, threads * packs packs in each row, a row for each block, weights of x's
// type, and E4M3 of the `known` pass. To know this takes a third of the instructions away.
template <typename Producer, Type in, int packs, bool regular, Pass known>
__global__ void __launch_bounds__(most_threads<Producer>(packs)) row_kernel(Fused f, Pass asked) {
  const Pass pass = regular ? known : asked;
  using T = typename Native<in>::type;
  const int rows = static_cast<int>(f.batch * f.rows), cols = static_cast<int>(f.cols);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = (blockIdx.y * packs * blockDim.x + threadIdx.x) * kWidth;
  const int reach = blockDim.x * kWidth;  // From one pack of a thread to its next.
  const auto has = [&](int p) { return regular || column + p * reach < cols; };
  const float share = 1.0f / static_cast<float>(cols);
  const Type data_type = regular ? Type::kE4M3 : f.data_type;
  const bool of_row = pass == Pass::kRow || pass == Pass::kAmax;
  // Twice, so that a warp may begin with the next row while another still reads.
  __shared__ float sum_parts[2][2][kMaxGroups];
  __shared__ uint32_t amax_parts[2][kWarp];

  // The last rows first after a pass over all of them: these may still be in the L2 cache.
  const int rows_grid = gridDim.x * (regular ? 1 : blockDim.y);  // Of all blocks together.
  const int step = pass == Pass::kTensor ? -rows_grid : rows_grid;
  const int own_row = regular ? 0 : threadIdx.y;  // Of those of the block.
  const int turn = blockIdx.x * (regular ? 1 : blockDim.y) + own_row;
  int row = pass == Pass::kTensor ? rows - 1 - turn : turn;
  int64_t at = int64_t{row} * cols + column;
  const int64_t step_at = int64_t{step} * cols;

  Pack<in, kWidth> first[packs] = {}, second[packs] = {};
  const auto fetch = [&](int64_t at) {
    const T* x = static_cast<const T*>(f.x) + Producer::kParts * at;
    if constexpr (Producer::kParts == 2) x -= column;
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if (!has(p)) continue;
      first[p].load(x + p * reach);
      if constexpr (Producer::kParts == 2) second[p].load(x + cols + p * reach);
      if constexpr (Producer::kResidual) {
        second[p].load(static_cast<const T*>(f.residual) + at + p * reach);
      }
    }
  };
  const auto is_row = [&](int row) {
    return static_cast<unsigned>(row) < static_cast<unsigned>(rows);
  };
  if (is_row(row)) fetch(at);

  // All rows of a block take as many turns.
  int turns = (rows - 1 - static_cast<int>(blockIdx.x * blockDim.y)) / rows_grid + 1;
  for (int parity = 0; turns > 0; --turns, row += step, at += step_at, parity ^= 1) {
    const bool inside = regular || is_row(row);
    const int entry = regular || f.batch == 1 || !inside ? 0 : row / static_cast<int>(f.rows);

    float values[packs][kWidth];
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if constexpr (Producer::kResidual) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) values[p][e] = first[p][e] + second[p][e];
        first[p] = make_pack<in>(values[p]);
        if (inside && has(p)) store_pack(static_cast<T*>(f.sum) + at + p * reach, first[p]);
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        values[p][e] = Producer::value(first[p][e], Producer::kParts == 2 ? second[p][e] : 0.0f);
      }
    }
    if (is_row(row + step)) fetch(at + step_at);

    // What is reduced before the factor of a norm is known: a factor that is not negative, and
    // rounding, leave the order of magnitudes as it is.
    float factor = 1.0f, amax = 0.0f;
    const auto take_amax = [&] {
      amax = pack_amax(values[0]);
#pragma unroll
      for (int p = 1; p < packs; ++p) amax = Larger()(amax, pack_amax(values[p]));
      put_amax(amax, amax_parts[parity] + own_row * warps);
    };
    if constexpr (Producer::kNorm) {
      const auto row_sum = [&](int which, const float (&of_packs)[packs]) {
        float sums[packs];
#pragma unroll
        for (int p = 0; p < packs; ++p) sums[p] = of_packs[p];
        const float sum = lanes_combine<kWarp>(sums, Add());
        float* parts = sum_parts[parity][which] + own_row * packs * warps;
        if (lane % (kWarp / packs) == 0) parts[lane / (kWarp / packs) * warps + warp] = sum;
        __syncthreads();
        return combine_groups<packs>(parts, packs * warps);
      };
      float mean = 0.0f, sums[packs];
      if constexpr (Producer::kCentered) {
#pragma unroll
        for (int p = 0; p < packs; ++p) sums[p] = pack_total(values[p]);
        mean = __fmul_rn(share, row_sum(0, sums));
#pragma unroll
        for (int p = 0; p < packs; ++p) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            values[p][e] = has(p) ? kept(values[p][e] - mean) : 0.0f;
          }
        }
      }
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        sums[p] = has(p) ? pack_moment<Producer>(values[p], 0.0f, kWidth) : 0.0f;
      }
      const int64_t place = int64_t{entry} * f.weight_stride + column;
      if constexpr (!Producer::kCentered) {
#pragma unroll
        for (int p = 0; p < packs; ++p) {
          if (!has(p)) continue;
          float weights[kWidth];
          load_weights<true, regular, in>(f.weight, f.weight_type, place + p * reach, kWidth,
                                          weights);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) values[p][e] = kept(__fmul_rn(values[p][e], weights[e]));
        }
        if (of_row) take_amax();
      }
      factor = reciprocal_deviation(__fmul_rn(share, row_sum(1, sums)), f.eps);
      if constexpr (Producer::kCentered) {
#pragma unroll
        for (int p = 0; p < packs; ++p) {
          if (!has(p)) continue;
          shift_and_scale<true, regular, in>(f, place + p * reach, kWidth, 0.0f, factor, values[p]);
        }
        factor = 1.0f;
      }
    }
    constexpr bool late = !Producer::kNorm || Producer::kCentered;
    const auto store = [&](int p, float inverse) {
      if (!late) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) values[p][e] = __fmul_rn(values[p][e], factor);
      }
      if constexpr (regular) {
        store_codes<Type::kE4M3, known == Pass::kGiven>(f.data + at + p * reach, values[p],
                                                        inverse);
      } else if (inside && has(p)) {
        store_codes(f, at + p * reach, values[p], inverse);
      }
    };

    const bool strips = pass == Pass::kStrips || (pass == Pass::kGiven && f.block_cols != 0);
    if (strips) {
      constexpr int share_lanes = kStrip / packs;  // Lanes with the scale of one pack.
      const int own = column + lane % kStrip / share_lanes * reach;  // In the strip of that pack.
      const bool has_own = inside && own - lane % kStrip * kWidth < cols;
      const int64_t place = int64_t{row} * ((cols + 127) / 128) + own / 128;
      float scale = 0.0f;
      if (pass == Pass::kStrips) {
        float amaxes[packs];
#pragma unroll
        for (int p = 0; p < packs; ++p) amaxes[p] = pack_amax(values[p]);
        scale = dynamic_scale(lanes_combine<kStrip>(amaxes, Larger()) * factor, data_type);
      } else if (has_own) {
        scale = f.given[place];
      }
      if (has_own && lane % share_lanes == 0) f.scale[place] = scale;
      const float inverse = inverse_scale(scale);
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        store(p, __shfl_sync(0xffffffffu, inverse, p * share_lanes, kStrip));
      }
      continue;
    }

    float scale = 0.0f;
    if (of_row) {
      if constexpr (late) {
        take_amax();
        __syncthreads();
      }
      amax = get_amax(amax_parts[parity] + own_row * warps) * factor;
      if (pass == Pass::kAmax) {
        if (inside && threadIdx.x == 0) amax_to_memory(f, entry, amax);
        continue;
      }
      scale = dynamic_scale(amax, data_type);
    } else if (inside) {
      scale = known_scale(f, pass, entry, row);
    }
    if (inside && threadIdx.x == 0 && blockIdx.y == 0) store_scale(f, entry, row, scale);
    const float inverse = inverse_scale(scale);
#pragma unroll
    for (int p = 0; p < packs; ++p) store(p, inverse);
  }
}

// How rows are spread in row_kernel: `packs` for each of `threads`, in `parts` along y.
struct Spread {
  int packs, threads, parts;
};

int multiprocessors() {
  int device = 0, count = 132;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <typename Producer, Type in, int packs, bool regular, Pass known>
cudaError_t launch(const Fused& f, Pass pass, const Spread& spread, cudaStream_t stream) {
  const int64_t rows = f.batch * f.rows;
  const int rows_block = std::max(1, 128 / spread.threads);
  int resident = 1;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &resident, row_kernel<Producer, in, packs, regular, known>, spread.threads * rows_block, 0);
  if (error != cudaSuccess) return error;
  // No more than run at once: a last few would take as long as all the others.
  const int64_t most = std::max(1, resident * multiprocessors() / spread.parts);
  const int64_t blocks = std::min(ceil_div(rows, rows_block), most);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(spread.parts));
  row_kernel<Producer, in, packs, regular, known>
      <<<grid, dim3(spread.threads, rows_block), 0, stream>>>(f, pass);
  return cudaGetLastError();
}

template <typename Producer, Type in, int packs>
cudaError_t launch_regular(const Fused& f, Pass pass, const Spread& spread, cudaStream_t stream) {
  switch (pass) {
    case Pass::kGiven:
      return launch<Producer, in, packs, true, Pass::kGiven>(f, pass, spread, stream);
    case Pass::kRow:
      return launch<Producer, in, packs, true, Pass::kRow>(f, pass, spread, stream);
    case Pass::kStrips:
      return launch<Producer, in, packs, true, Pass::kStrips>(f, pass, spread, stream);
    case Pass::kAmax:
      return launch<Producer, in, packs, true, Pass::kAmax>(f, pass, spread, stream);
    default:
      return launch<Producer, in, packs, true, Pass::kTensor>(f, pass, spread, stream);
  }
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

template <typename Producer, Type in>
bool run(const Fused& f, Pass pass, cudaStream_t stream, cudaError_t* error) {
  // As many packs as fit into the registers of a thread, with as many threads as hide a load.
  constexpr bool twice = Producer::kResidual || Producer::kParts == 2 || in == Type::kF32;
  constexpr int many = twice ? 2 : 4;
  const Spread spread = spread_of(f, Producer::kNorm || pass == Pass::kRow, many);
  if (!is_wide(f) || f.cols >= 1 << 24 || f.batch * f.rows >= 1 << 30 ||
      spread.threads > most_threads<Producer>(spread.packs)) {
    return false;
  }
  // Of float32 there are twice the bytes to wait for: instructions count less.
  constexpr bool narrow = in != Type::kF32;
  const bool regular = narrow && f.batch == 1 && spread.threads >= 128 &&
                       f.cols == int64_t{spread.packs} * spread.threads * spread.parts * kWidth &&
                       f.data_type == Type::kE4M3 && (f.weight == nullptr || f.weight_type == in) &&
                       (f.bias == nullptr || f.bias_type == in);
  if constexpr (narrow) {
    if (spread.packs == many && regular) {
      *error = launch_regular<Producer, in, many>(f, pass, spread, stream);
      return true;
    }
  }
  *error = spread.packs == 1
               ? launch<Producer, in, 1, false, Pass::kRow>(f, pass, spread, stream)
               : launch<Producer, in, many, false, Pass::kRow>(f, pass, spread, stream);
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
