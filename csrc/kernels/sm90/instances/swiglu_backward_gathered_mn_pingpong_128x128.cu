#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_GROUPED_GEMM(kPingPong128x128, kGathered, kMn, kSwigluBackward);

}  // namespace scattermoe::kernels::sm90
