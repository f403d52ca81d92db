#pragma once

// Whether a product is one for the Hopper kernels: what every function asks that has one of them to launch.

#include "device.h"
#include "grouped_gemm.h"
#include "select.h"
#include "sm90/sm90.h"

namespace scattermoe::kernels {

// A product as select_gemm() sees it. aligned: every row of both operands starts at a multiple of 16 bytes.
inline GemmQuery gemm_query(const GroupedGemmParams& p, int arch, bool aligned, bool hopper) {
    return {p.dtype,      p.allow_tf32, arch, aligned, p.num_slots, p.num_experts, /*weight_gradient=*/false,
            int64_t{p.n}, hopper};
}
inline GemmQuery gemm_query(const WeightGradParams& p, int arch, bool aligned, bool hopper) {
    return {p.dtype,      p.allow_tf32, arch, aligned, p.num_slots, p.num_experts, /*weight_gradient=*/true,
            int64_t{p.n}, hopper};
}
inline GemmQuery gemm_query(const sm90::GluGemmParams& p, int arch, bool aligned, bool hopper) {
    return gemm_query(p.gemm, arch, aligned, hopper);
}
inline GemmQuery gemm_query(const sm90::GluBackwardGemmParams& p, int arch, bool aligned, bool hopper) {
    return gemm_query(p.gemm, arch, aligned, hopper);
}

// Whether the kernels of sm90/ are there, take the operands and are the choice for so many rows.
template <typename Params>
bool takes_hopper([[maybe_unused]] const Params& p) {
#if defined(SCATTERMOE_SM90)
    DeviceFacts device;
    return current_device(device) == cudaSuccess && device.code_architecture == 90 && sm90::is_enabled() &&
           sm90::can_run(p) &&
           select_gemm(gemm_query(p, device.code_architecture, /*aligned=*/true, /*hopper=*/true)).engine ==
               GemmEngine::kHopper;
#else
    return false;
#endif
}

}  // namespace scattermoe::kernels
