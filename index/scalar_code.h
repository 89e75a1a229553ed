/* Scalar code: 8 bits a dimension where the code is dim bytes, 4 bits, low nibble first, where it
 * is half of that (rounded up). Levels are evenly spaced between two quantiles of the dimension,
 * those that lose least on the sample; what lies outside is clamped. Behind quantiser.h. */
#ifndef ANND_INDEX_SCALAR_CODE_H
#define ANND_INDEX_SCALAR_CODE_H

#include "index/code_methods.h"

extern const struct code_methods scalar_code_methods;

#endif
