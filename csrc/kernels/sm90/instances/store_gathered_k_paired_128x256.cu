#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_GROUPED_GEMM(kPaired128x256, kGathered, kK, kStore);

}  // namespace scattermoe::kernels::sm90
