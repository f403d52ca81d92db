#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_WEIGHT_GRAD(kPaired256x128, kRight, kBesideSum);

}  // namespace scattermoe::kernels::sm90
