#include "device.h"

#include <array>
#include <atomic>

namespace scattermoe::kernels {

namespace {

__global__ void probe_kernel() {}

constexpr int kMaxDevices = 64;

}  // namespace

cudaError_t code_architecture(int& arch) {
    static std::array<std::atomic<int>, kMaxDevices> known{};
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const bool cached = device < kMaxDevices;
    arch = cached ? known[device].load(std::memory_order_relaxed) : 0;
    if (arch != 0) return cudaSuccess;
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (error != cudaSuccess) return error;
    arch = attributes.ptxVersion;
    if (cached) known[device].store(arch, std::memory_order_relaxed);
    return cudaSuccess;
}

}  // namespace scattermoe::kernels
