#include "device.h"

#include <array>
#include <atomic>

namespace scattermoe::kernels {

namespace {

__global__ void probe_kernel() {}

constexpr int kMaxDevices = 64;

cudaError_t ask(DeviceFacts& facts) {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (error != cudaSuccess) return error;
    facts.code_architecture = attributes.ptxVersion;
    return cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, facts.device);
}

}  // namespace

cudaError_t current_device(DeviceFacts& facts) {
    struct Known {
        std::atomic<int> code_architecture{0};
        std::atomic<int> multiprocessors{0};
    };
    static std::array<Known, kMaxDevices> devices{};
    cudaError_t error = cudaGetDevice(&facts.device);
    if (error != cudaSuccess) return error;
    if (facts.device >= kMaxDevices) return ask(facts);
    Known& known = devices[facts.device];
    facts.code_architecture = known.code_architecture.load(std::memory_order_relaxed);
    facts.multiprocessors = known.multiprocessors.load(std::memory_order_relaxed);
    if (facts.code_architecture != 0 && facts.multiprocessors != 0) return cudaSuccess;
    error = ask(facts);
    if (error != cudaSuccess) return error;
    known.code_architecture.store(facts.code_architecture, std::memory_order_relaxed);
    known.multiprocessors.store(facts.multiprocessors, std::memory_order_relaxed);
    return cudaSuccess;
}

}  // namespace scattermoe::kernels
