/* Optimised product quantiser: a rotation, then pq.
 * Ge, He, Ke, Sun, "Optimized Product Quantization", TPAMI 2014, the parametric solution: the
 * rotation is the PCA's, its axes dealt to chunks so that the products of their variances are
 * balanced. Departures: no alternating refinement, and the rotation is applied without centring, so
 * that inner products survive it. Behind quantiser.h. */
#ifndef ANND_INDEX_OPQ_H
#define ANND_INDEX_OPQ_H

#include "index/code_methods.h"

/* Above, a rotation takes over 32 MiB and milliseconds a query. */
#define OPQ_DIM_MAX 4096u
/* Above, CODE_AUTO does not consider it. At 2,048 the rotation, 8 MiB, comes from the third cache
 * at best and costs a query most of a millisecond; where it halves the rows to be read, of 8 KiB
 * each, that is well spent. */
#define OPQ_DIM_AUTO_MAX 2048u

extern const struct code_methods opq_methods;

#endif
