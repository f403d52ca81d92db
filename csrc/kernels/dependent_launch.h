#pragma once

// Programmatic dependent launch: a kernel's blocks are there, and have set themselves up, when the last of the kernel
// before are done. Whoever is launched so must call begin_dependent() before it touches memory that others write or
// read. What was written before the kernel before began is there without that, where that one has called it.
//
// A kernel that needs nothing of the one before, and writes where that one and what was freed since are not, may call
// begin_beside() in place of it: its blocks take the SMs that the other's last tiles leave idle. It has to call
// end_beside() in the end, so that whoever waits for it has waited for the one before as well.

#include <cuda_runtime.h>

#include <utility>

#include "device.h"
#include "ptx/griddepcontrol.h"

namespace scattermoe::kernels {

__device__ __forceinline__ void begin_dependent() {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
}

__device__ __forceinline__ void begin_beside() {
    ptx::grid_launch_dependents();
}

__device__ __forceinline__ void end_beside() {
    ptx::grid_dependency_wait();
}

// In an attribute of a launch. Code for older GPUs, also where it runs on a newer one, does not wait: it must not begin
// early.
inline bool set_dependent(cudaLaunchAttribute& attribute, const DeviceFacts& device) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return device.code_architecture >= 90;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                             Arguments&&... arguments) {
    DeviceFacts device;
    const cudaError_t error = current_device(device);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = set_dependent(attribute, device) ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...);
}

}  // namespace scattermoe::kernels
