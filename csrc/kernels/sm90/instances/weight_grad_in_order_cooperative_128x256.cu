#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_WEIGHT_GRAD(kCooperative128x256, kNeither, kPlain);

}  // namespace scattermoe::kernels::sm90
