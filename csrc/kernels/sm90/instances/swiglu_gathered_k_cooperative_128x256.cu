#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_GROUPED_GEMM(kCooperative128x256, kGathered, kK, kSwiglu);

}  // namespace scattermoe::kernels::sm90
