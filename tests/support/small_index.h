/* small_index: a seeded clustered set in memory and an index of it in a temporary folder. */
#ifndef ANND_TESTS_SUPPORT_SMALL_INDEX_H
#define ANND_TESTS_SUPPORT_SMALL_INDEX_H

#include "index/index_directory.h"
#include "index/segment_build.h"
#include "index/truth_file.h"

struct small_index {
    char folder[64]; /* the temporary folder; the index is <folder>/index */
    char path[80];
    char segment[160]; /* its one segment's folder */
    float *rows;
    float *queries;
    uint32_t row_count;
    uint32_t query_count;
    uint32_t dim;
    struct truth truth; /* exact, k = 10 */
};

struct small_options {
    uint32_t rows, queries, dim;
    enum element_type element;
    struct segment_build_params params;
    uint32_t workers;
    const int64_t *keys; /* NULL: row numbers */
};

/* L2, f32 input, 16-byte codes, degree 32, list 64, f16 store, one worker. */
struct small_options small_options_default(uint32_t rows, uint32_t dim);
/* Fails the test on any error. */
void small_index_make(const struct small_options *options, struct small_index *out);
void small_index_remove(struct small_index *index);

#endif
