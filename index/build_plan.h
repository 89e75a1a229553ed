/* build_plan: what a build will hold in memory and on disk, phase by phase, before it starts.
 *
 * Arithmetic alone: nothing is read. A build refuses what the plan says cannot fit, holds the rows
 * in memory while graph and order are made where the plan says they fit, and cuts the page order
 * into windows where it does not fit in one. */
#ifndef ANND_INDEX_BUILD_PLAN_H
#define ANND_INDEX_BUILD_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "index/row_store.h"
#include "index/segment_build.h"

#define BUILD_PLAN_PHASES 7u

struct build_plan_phase {
    const char *name;
    const char *what; /* is held, in words */
    uint64_t bytes;   /* at the peak of the phase, the process's own included */
};

struct build_plan {
    struct build_plan_phase phases[BUILD_PLAN_PHASES];
    uint32_t phase_count;
    uint64_t memory_bytes;  /* of the greatest phase */
    uint32_t greatest;      /* its number */
    bool hold;              /* rows are held in memory for graph and order */
    uint32_t window_rows;   /* of the page order; 0: one window */
    uint64_t scratch_bytes; /* in the output folder while it runs, beside the index, at most */
    uint64_t index_bytes;   /* of the finished index, records not counted */
};

/* params: defaults filled in (segment_build_params_check), with the memory granted in them, 0 for
 * no limit. */
void build_plan_make(const struct row_shape *shape, uint64_t rows,
                     const struct segment_build_params *params, uint32_t workers,
                     struct build_plan *plan);

/* What a process holds besides what it builds with: itself, stacks, OpenBLAS' buffers. */
uint64_t build_plan_process_bytes(uint32_t workers);

/* ERR_BUDGET with the greatest phase's sum spelled out when the plan exceeds memory_bytes. */
int build_plan_check(const struct build_plan *plan, const char *input, uint64_t memory_bytes,
                     struct error *err);

#endif
