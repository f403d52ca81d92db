#pragma once

#include <cuda_runtime.h>

namespace scattermoe::kernels {

// The architecture that the code loaded on the current device was compiled for: 90 for sm_90 machine code, 120 also on
// a newer chip that translates the PTX of compute_120. Kernels are compiled differently for different architectures, so
// their launch follows this and not the chip.
cudaError_t code_architecture(int& arch);

}  // namespace scattermoe::kernels
