/* vector_stats: what can be said about a file of vectors after one pass over it. */
#ifndef ANND_TOOLS_VECTOR_STATS_H
#define ANND_TOOLS_VECTOR_STATS_H

#include <stdint.h>

#include "index/vector_source.h"
#include "storage/base/job.h"

struct vector_stats {
    uint64_t nan_count;        /* values */
    uint64_t infinity_count;   /* values */
    uint64_t bad_rows;         /* rows with either; they have no norm */
    uint64_t first_bad_row;    /* when bad_rows is not 0 */
    uint64_t zero_vectors;     /* rows of zeros only */
    double norm_min, norm_max; /* over the rows that have a norm, 0 when none has */
    double norm_mean, norm_deviation;
    uint64_t sample_rows;   /* the rows whose hash fell into the sample */
    uint64_t sample_copies; /* those of them that repeat, byte for byte, another row of it */
};

/* Reads all of `source` once, in blocks; memory does not grow with the file. ERR_CANCELLED, ERR_IO,
 * ERR_NOMEM, ERR_UNSUPPORTED for element types that are not f32, i8 or u8. */
int vector_stats_scan(const struct vector_source *source, struct job *job, struct vector_stats *out,
                      struct error *err);

#endif
