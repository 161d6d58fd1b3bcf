// A kernel that starts before the one in front of it in the stream has ended: on Hopper and later,
// where its launch asks for it (programmatic stream serialization), also in a captured graph.
#pragma once

#include <cuda_runtime.h>

namespace jax_fp8 {

// Lets the next kernel start on what room there is. Any kernel may say so at any time: the next one
// still waits for its end before it reads what this one writes.
__device__ inline void let_follow() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel in front has ended and what it wrote is to be seen. Where the launch did not ask
// for an early start there is nothing to wait for.
__device__ inline void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches a kernel, which follows the one in front of it or does not. Where several follow one
// another, each may start while the last that does not still runs: before its wait a kernel reads
// what none of these writes. A kernel that was compiled for devices before Hopper, and so does not
// wait, does not start early on a later one either.
//
// `cluster`: how many blocks along x make a cluster, more than one only where devices have them.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), bool follows, int cluster, dim3 grid,
                            dim3 block, int bytes, cudaStream_t stream,
                            const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaFuncAttributes compiled{};
  if (follows && cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess &&
      compiled.ptxVersion >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();  // Told here, and no longer to whoever asks next.
  return error;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), bool follows, dim3 grid, dim3 block,
                          int bytes, cudaStream_t stream, const Arguments&... arguments) {
  return launch_clusters(kernel, follows, 1, grid, block, bytes, stream, arguments...);
}

}  // namespace jax_fp8
