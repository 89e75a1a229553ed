/* queries: a file of query vectors as floats, and the thread count option, for the verbs that
 * search. */
#ifndef ANND_TOOLS_QUERIES_H
#define ANND_TOOLS_QUERIES_H

#include <stdint.h>

#include "index/search_engine.h"
#include "index/vector_source.h"
#include "storage/base/error.h"

struct queries {
    float *vectors; /* count x dim */
    uint32_t count;
    uint32_t dim;
};

/* ERR_INVALID: NaN, infinity, or a dimension other than dim (0: any). */
int queries_read(const char *path, uint32_t dim, struct queries *out, struct error *err);
void queries_release(struct queries *queries);

/* Sizes an engine for one index. */
struct search_engine_options queries_engine_options(const struct disk_index *index,
                                                    uint32_t threads, uint32_t slots,
                                                    uint32_t beam_width, uint32_t search_list_max,
                                                    uint32_t k, enum reader_backend backend);

#endif
