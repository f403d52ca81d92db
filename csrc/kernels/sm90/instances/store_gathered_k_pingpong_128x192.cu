#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_GROUPED_GEMM(kPingPong128x192, kGathered, kK, kStore);

}  // namespace scattermoe::kernels::sm90
