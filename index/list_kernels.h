/* list_kernels: passes over the short unsorted arrays in which a walk keeps its candidates.
 *
 * A few hundred floats are sixteen or so registers: counting how many lie below a bound, or finding
 * the least, costs less than keeping them sorted would.
 *
 * Arrays need no alignment; floats are never NaN. Every instruction set gives the same results,
 * down to the order of what is kept. Pure functions without state: any thread. */
#ifndef ANND_INDEX_LIST_KERNELS_H
#define ANND_INDEX_LIST_KERNELS_H

#include <stdint.h>

#include "index/distance.h"

/* Shares of a hit are whole numbers, so that their sum does not depend on its order. */
#define SHARE_ONE (1u << 20)
#define SHARE_STEPS 256u         /* entries of a share table */
#define SHARE_STEPS_A_UNIT 32.0f /* so -4 standard errors to just below 4 */
#define LIST_NONE UINT32_MAX

/* Candidates, a column each. */
struct candidate_columns {
    float *distance;
    float *sharpness; /* one over the standard error of the distance */
    uint32_t *position;
    uint32_t *page;
};

struct list_kernels {
    const char *name; /* as distance_kernels */

    /* How many of the values lie below the bound. */
    uint32_t (*below)(const float *values, uint32_t count, float bound);
    /* The first of the least distances among those whose page is in [from, to), or LIST_NONE. */
    uint32_t (*nearest)(const float *distance, const uint32_t *page, uint32_t count, uint32_t from,
                        uint32_t to);
    /* Where the value stands first, or LIST_NONE. */
    uint32_t (*find)(const uint32_t *values, uint32_t count, uint32_t value);
    /* Closes the gaps left by all of one page; returns how many stay. */
    uint32_t (*drop_page)(const struct candidate_columns *columns, uint32_t count, uint32_t page);
    /* The same for all beyond the bound; of those at the bound the first `ties` stay. */
    uint32_t (*drop_beyond)(const struct candidate_columns *columns, uint32_t count, float bound,
                            uint32_t ties);
    /* Sum of shares[i] with i the whole part of (distance - bound) * sharpness in steps, from the
     * table's middle; nothing beyond its end, the first entry before its beginning. */
    uint64_t (*shares)(const float *distance, const float *sharpness, uint32_t count, float bound,
                       const uint32_t shares[SHARE_STEPS]);
};

/* NULL when this CPU, system or build lacks the set; ISA_SCALAR is always there. */
const struct list_kernels *list_kernels_for(enum isa isa);
/* The version for the instruction set that distance_kernels_best chose, hence for ANND_ISA too. */
const struct list_kernels *list_kernels_best(void);

#if defined(__x86_64__)
extern const struct list_kernels list_kernels_avx512;
#endif

#endif
