// What the module registers: for each target and platform, the handler of each stage.
#pragma once

#include <map>
#include <string>

namespace jax_fp8 {

using Stages = std::map<std::string, void*>;

Stages cast_transpose_cpu_stages();
Stages cast_transpose_cuda_stages();
Stages line_amaxes_cpu_stages();
Stages line_amaxes_cuda_stages();
Stages fused_matmul_cpu_stages();
Stages fused_matmul_cuda_stages();
Stages fused_quantize_cpu_stages();
Stages fused_quantize_cuda_stages();
Stages quantize_cpu_stages();
Stages quantize_cuda_stages();
Stages scaled_matmul_cpu_stages();
Stages scaled_matmul_cuda_stages();

}  // namespace jax_fp8
