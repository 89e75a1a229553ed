/* calibrate: measures, on a finished field, which rule reaches which recall at the fewest reads.
 *
 * Queries are the user's, or rows of the segment itself. A stored row is a biased query: its page
 * holds its neighbours. So the rows that serve as queries took no part in the order of the pages
 * (page_layout.h: apart), and each is hidden from its own search. One walk a query with the stop
 * rule all but off tells what every rule would have answered: a rule only cuts a walk short. */
#ifndef ANND_INDEX_CALIBRATE_H
#define ANND_INDEX_CALIBRATE_H

#include "index/disk_index.h"
#include "index/walk_rule.h"
#include "storage/base/job.h"
#include "storage/base/pool.h"

struct calibrate_queries {
    const float *vectors; /* count x dim, as users send them */
    uint32_t count;
    const uint32_t *hidden; /* position of each query's own row, or NULL: none is a row */
    const uint32_t *truth;  /* count x truth_k positions, the true nearest, nearest first; a query's
                             * own hidden row is not among them */
    uint32_t truth_k;       /* curves are made for k of 1, 10, 100 up to this */
};

/* Measures curves at several resident shares: none, what serve_memory_bytes allows (0: skip), and
 * half and all the pages where memory_bytes_max (0: no limit) permits to hold them; the workers'
 * scratch, some MB each, is not counted, since the result must not depend on their number. What
 * memory_bytes_max leaves beyond that holds pages that were read, 1 GiB of them at most: that
 * spares reads and changes no result. It bounds what is held in here: what the caller holds
 * meanwhile is to be taken off first. For k of 10 all queries walk, for 100 an even part of some
 * hundreds; for 1 all at the share that is served, a part at the others. Calls
 * reader_open(READER_AUTO) on every worker. ERR_INVALID: no queries or no truth; ERR_CANCELLED,
 * ERR_IO, ERR_CORRUPT, ERR_NOMEM. */
int calibrate_field(const struct segment *segment, uint32_t field,
                    const struct calibrate_queries *queries, uint64_t serve_memory_bytes,
                    uint64_t memory_bytes_max, struct pool *pool, struct job *job,
                    struct walk_calibration *out, struct error *err);

#endif
