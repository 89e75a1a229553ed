#include "tests/support/small_index.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/flat.h"
#include "storage/base/random.h"
#include "storage/file.h"

#define SEED 20260101u

struct small_options small_options_default(uint32_t rows, uint32_t dim)
{
    return (struct small_options){.rows = rows,
                                  .queries = 50,
                                  .dim = dim,
                                  .element = ELEMENT_F32,
                                  .params = {.metric = METRIC_L2,
                                             .code = CODE_PQ,
                                             .code_bytes = dim < 16 ? dim : 16,
                                             .max_degree = 32,
                                             .build_list = 64,
                                             .alpha = 1.2f,
                                             .seed = 1,
                                             .keep_originals = true},
                                  .workers = 1};
}

static void fill(float *out, uint32_t count, uint32_t dim, bool integers, uint64_t stream)
{
    uint32_t clusters = 40;
    float *centres = malloc((size_t)clusters * dim * sizeof *centres);
    struct random random;

    random_init(&random, SEED, 0);
    for (size_t i = 0; i < (size_t)clusters * dim; i++)
        centres[i] = random_float(&random) * 2 - 1;
    random_init(&random, SEED, stream);
    for (uint32_t i = 0; i < count; i++) {
        const float *centre = centres + random_below(&random, clusters) * dim;

        for (uint32_t d = 0; d < dim; d++) {
            float value = centre[d] + 0.4f * random_normal(&random);

            if (integers) { /* 0..127: fits u8 and i8 */
                value = rintf(64 + 24 * value);
                value = value < 0 ? 0 : value > 127 ? 127 : value;
            }
            out[(size_t)i * dim + d] = value;
        }
    }
    free(centres);
}

void small_index_make(const struct small_options *o, struct small_index *out)
{
    size_t values = (size_t)o->rows * o->dim;
    bool integers = o->element != ELEMENT_F32;
    uint8_t *bytes = malloc(values);
    struct error err = ERROR_INIT;
    struct vector_source *source = NULL;
    struct segment_build_rows rows = {.int64_keys = o->keys};
    struct segment_build_result result;
    struct pool *pool = NULL;
    const char *tmp = getenv("TMPDIR");

    *out = (struct small_index){.row_count = o->rows, .query_count = o->queries, .dim = o->dim};
    snprintf(out->folder, sizeof out->folder, "%.40s/annd-test-XXXXXX", tmp ? tmp : "/var/tmp");
    assert_non_null(mkdtemp(out->folder));
    snprintf(out->path, sizeof out->path, "%s/index", out->folder);
    out->rows = malloc(values * sizeof *out->rows);
    out->queries = malloc((size_t)o->queries * o->dim * sizeof *out->queries);
    fill(out->rows, o->rows, o->dim, integers, 1);
    fill(out->queries, o->queries, o->dim, integers, 2);
    for (size_t i = 0; integers && i < values; i++)
        bytes[i] = (uint8_t)out->rows[i];
    if (vector_source_open_memory(integers ? (const void *)bytes : out->rows, o->element, o->rows,
                                  o->dim, "memory", &source, &err) < 0 ||
        pool_new(o->workers, &pool, &err) < 0 || file_mkdir(vfs_posix(), out->path, &err) < 0)
        fail_msg("%s", err.message);
    if (schema_default("id", FIELD_INT64, 0, "vector",
                       o->element == ELEMENT_I8 ? FIELD_INT8_VECTOR : FIELD_FLOAT_VECTOR, o->dim,
                       (struct schema **)(void *)&rows.schema, &err) < 0)
        fail_msg("%s", err.message);
    if (segment_build(vfs_posix(), out->path, source, &rows, &o->params, NULL, pool, NULL, &result,
                      &err) < 0)
        fail_msg("%s", err.message);
    const char *name = result.name;

    if (index_directory_publish(vfs_posix(), out->path, rows.schema, &name, 1, &err) < 0)
        fail_msg("%s", err.message);
    snprintf(out->segment, sizeof out->segment, "%s/%s", out->path, name);
    if (flat_truth(source, out->queries, o->queries, 10, o->params.metric, pool, NULL, &out->truth,
                   &err) < 0)
        fail_msg("%s", err.message);
    schema_free((struct schema *)(uintptr_t)rows.schema);
    vector_source_close(source);
    pool_free(pool);
    free(bytes);
}

void small_index_remove(struct small_index *index)
{
    file_remove_all(vfs_posix(), index->folder, NULL);
    truth_release(&index->truth);
    free(index->rows);
    free(index->queries);
}
