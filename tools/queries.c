#include "tools/queries.h"

#include <stdlib.h>

int queries_read(const char *path, uint32_t dim, struct queries *out, struct error *err)
{
    struct vector_source *source = NULL;
    int rc = -1;

    *out = (struct queries){0};
    if (vector_source_open(vfs_posix(), path, &source, err) < 0)
        return -1;
    uint64_t rows = vector_source_rows(source);

    out->dim = vector_source_dim(source);
    if (dim && out->dim != dim) {
        error_set(err, ERR_INVALID, "%s has %u dimensions, the index has %u", path, out->dim, dim);
        goto done;
    }
    if (rows > 10000000) {
        error_set(err, ERR_INVALID, "%s has %llu queries; at most 10,000,000 are taken at once",
                  path, (unsigned long long)rows);
        goto done;
    }
    out->count = (uint32_t)rows;
    out->vectors = malloc(rows * out->dim * sizeof *out->vectors);
    if (!out->vectors) {
        error_set(err, ERR_NOMEM, "no memory for %llu queries", (unsigned long long)rows);
        goto done;
    }
    if (vector_source_read_f32(source, 0, rows, out->vectors, err) < 0)
        goto done;
    if (vector_check_finite(out->vectors, 0, rows, out->dim, err) < 0) {
        error_prefix(err, "%s", path);
        goto done;
    }
    rc = 0;
done:
    vector_source_close(source);
    if (rc < 0)
        queries_release(out);
    return rc;
}

void queries_release(struct queries *queries)
{
    free(queries->vectors);
    *queries = (struct queries){0};
}

struct search_engine_options queries_engine_options(const struct disk_index *index,
                                                    uint32_t threads, uint32_t slots,
                                                    uint32_t beam_width, uint32_t search_list_max,
                                                    uint32_t k, enum reader_backend backend)
{
    return (struct search_engine_options){
        .threads = threads,
        .slots_per_thread = slots,
        .beam_width = beam_width,
        .search_list_max = search_list_max,
        .k_max = k,
        .dim_max = index->dim,
        .page_bytes_max = index->format.page_bytes,
        .table_floats_max = quantiser_table_floats(index->quantiser),
        .scratch_floats_max = quantiser_scratch_floats(index->quantiser),
        .backend = backend};
}
