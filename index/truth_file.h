/* Truth files: the exact nearest neighbours of a query set, for measuring recall.
 *
 * uint32 query_count, uint32 k, then query_count x k uint32 row numbers, then as many float32
 * distances; little-endian, row-major, nearest first. Checked like every file from outside. */
#ifndef ANND_INDEX_TRUTH_FILE_H
#define ANND_INDEX_TRUTH_FILE_H

#include <stdint.h>

#include "storage/base/error.h"
#include "storage/vfs.h"

/* ids and distances: query_count x k, malloc'ed. */
struct truth {
    uint32_t query_count;
    uint32_t k;
    uint32_t *ids;
    float *distances;
};

/* Whole file into memory; *out is the caller's and ends with truth_release(). base_rows, unless 0,
 * is the number of rows the ids are to point into. ERR_INVALID for a wrong length, a count of
 * zero, an id outside the base, a distance that is NaN. */
int truth_file_read(struct vfs *vfs, const char *path, uint64_t base_rows, struct truth *out,
                    struct error *err);
/* Published whole, as file_publish(). ERR_INVALID for counts of zero. */
int truth_file_write(struct vfs *vfs, const char *path, const struct truth *truth,
                     struct error *err);
/* Frees the arrays and zeroes the struct. A zeroed struct is accepted. */
void truth_release(struct truth *truth);

#endif
