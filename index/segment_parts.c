/* How it works: positions are gone through in order. What a row is comes from the scratch files by
 * its place, a read each: neighbours in page order stand near each other in space order, so the
 * page cache has most of them. Runs of rows or pages are made by the pool and appended by the
 * calling thread. A section that a former run left behind a checkpoint goes on there. */
#include "index/segment_parts.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/rows.h"
#include "storage/file.h"

#define ENCODE_ROWS 16384u
#define PAGE_RUN 512u /* pages encoded at once */

void raw_to_floats(const uint8_t *raw, enum element_type type, uint64_t n, float *out)
{
    if (type == ELEMENT_F32)
        memcpy(out, raw, n * 4);
    else if (type == ELEMENT_U8)
        for (uint64_t i = 0; i < n; i++)
            out[i] = raw[i];
    else
        for (uint64_t i = 0; i < n; i++)
            out[i] = (int8_t)raw[i];
}

/* ---- rows by place, in parallel ---- */

struct gather {
    const struct build *b;
    uint32_t first; /* position */
    uint8_t *raw;   /* rows x raw_bytes */
    float *floats;  /* rows x dim as the codes see them, or NULL */
    bool failed;
    struct error error;
};

static void gather_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct gather *g = context;
    const struct build *b = g->b;

    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        uint8_t *raw = g->raw + i * b->shape.raw_bytes;
        struct error err = ERROR_INIT;

        if (row_store_read_raw(b->row_store, b->order[g->first + i], 1, raw, &err) < 0) {
            if (!__atomic_exchange_n(&g->failed, true, __ATOMIC_ACQ_REL))
                g->error = err;
            return;
        }
        if (!g->floats)
            continue;
        raw_to_floats(raw, b->shape.element, b->dim, g->floats + i * b->dim);
        if (b->params.metric == METRIC_COSINE)
            vector_normalise(g->floats + i * b->dim, b->dim);
    }
}

static int gather_rows(struct gather *g, uint32_t first, uint32_t rows, struct error *err)
{
    g->first = first;
    pool_for(g->b->pool, rows, 64, gather_range, g);
    if (g->failed)
        *err = g->error;
    return g->failed ? -1 : 0;
}

/* Every so often what is written is made durable. */
static int checkpoint(struct build *b, struct error *err)
{
    if (!journal_commit_due(b->journal))
        return 0;
    /* The journal has nothing new to say; its age is the clock of both. */
    if (segment_writer_checkpoint(b->writer, NULL, err) < 0)
        return -1;
    return journal_commit(b->journal, err);
}

/* ---- codes and cells ---- */

static int write_cells(struct build *b, struct cells_builder *builder, struct error *err)
{
    struct cells *cells = NULL;
    uint8_t *bytes = NULL;
    size_t count;
    int rc = -1;

    if (cells_builder_finish(builder, &cells, err) < 0 ||
        cells_encode_bytes(cells, &bytes, &count, err) < 0 ||
        segment_writer_begin(b->writer, "f0.cells", SECTION_CELLS, FILE_BLOCK_BYTES, err) < 0 ||
        segment_writer_append(b->writer, bytes, count, err) < 0)
        goto done;
    rc = segment_writer_end(b->writer, err);
done:
    free(bytes);
    cells_free(cells);
    return rc;
}

/* The centroids of the cells first, in one pass with the codes; codes that are written already are
 * passed over. */
static int write_codes(struct build *b, struct error *err)
{
    uint32_t code_bytes = quantiser_code_bytes(b->quantiser);
    float *vectors = malloc((uint64_t)ENCODE_ROWS * b->dim * sizeof *vectors);
    uint8_t *raw = malloc((uint64_t)ENCODE_ROWS * b->shape.raw_bytes);
    uint8_t *codes = malloc((uint64_t)ENCODE_ROWS * code_bytes);
    bool has_codes = segment_writer_has(b->writer, "f0.codes");
    struct gather gather = {.b = b, .raw = raw, .floats = vectors};
    struct cells_builder *cells = NULL;
    uint64_t written = 0; /* bytes of codes */
    int rc = -1;

    job_phase(b->job, "codes", b->count);
    if (!vectors || !raw || !codes) {
        error_set(err, ERR_NOMEM, "no memory for a block of codes");
        goto done;
    }
    if (cells_builder_new(b->count, b->cell_pages * b->format.capacity, b->dim, &cells, err) < 0 ||
        (!has_codes && segment_writer_begin_at(b->writer, "f0.codes", SECTION_CODES,
                                               FILE_BLOCK_BYTES, b->job, &written, err) < 0))
        goto done;
    for (uint32_t first = 0; first < b->count; first += ENCODE_ROWS) {
        uint32_t rows = b->count - first < ENCODE_ROWS ? b->count - first : ENCODE_ROWS;
        uint64_t begin = (uint64_t)first * code_bytes;
        uint64_t end = begin + (uint64_t)rows * code_bytes;

        if (gather_rows(&gather, first, rows, err) < 0)
            goto done;
        cells_builder_add(cells, vectors, rows);
        if (!has_codes && written < end) {
            uint64_t skip = written > begin ? written - begin : 0;

            if (quantiser_encode(b->quantiser, vectors, rows, b->pool, codes, err) < 0 ||
                segment_writer_append(b->writer, codes + skip, end - begin - skip, err) < 0 ||
                checkpoint(b, err) < 0)
                goto done;
        }
        if (job_advance(b->job, rows, err) < 0)
            goto done;
    }
    if (!has_codes && segment_writer_end(b->writer, err) < 0)
        goto done;
    rc = write_cells(b, cells, err);
done:
    free(vectors);
    free(raw);
    free(codes);
    cells_builder_free(cells);
    return rc;
}

static int write_quantiser(struct build *b, struct error *err)
{
    uint8_t *bytes = NULL;
    size_t count;
    int rc = -1;

    if (quantiser_encode_bytes(b->quantiser, &bytes, &count, err) < 0)
        return -1;
    if (segment_writer_begin(b->writer, "f0.quantiser", SECTION_QUANTISER, FILE_BLOCK_BYTES, err) ==
            0 &&
        segment_writer_append(b->writer, bytes, count, err) == 0)
        rc = segment_writer_end(b->writer, err);
    free(bytes);
    return rc;
}

/* ---- pages ---- */

/* One worker's scratch for a page. */
struct page_scratch {
    struct page_node *nodes;
    uint8_t *vectors;
    uint8_t *raw;
    float *floats;
    uint32_t *records; /* of the graph, one a node */
    struct error error;
};

struct page_run {
    struct build *b;
    uint64_t first_page;
    uint8_t *payload;
    struct page_scratch *scratch; /* one a worker */
    uint64_t kept[PAGE_RUN];
    uint64_t given[PAGE_RUN];
    uint64_t degrees[PAGE_RUN];
    bool failed;
};

static void store_row(const struct build *b, const uint8_t *raw, float *floats, uint8_t *out)
{
    raw_to_floats(raw, b->shape.element, b->dim, floats);
    if (b->normalised)
        vector_normalise(floats, b->dim);
    store_encode(b->store, b->params.metric, floats, b->dim, out);
}

static int encode_page(struct page_run *run, struct page_scratch *s, uint64_t i)
{
    struct build *b = run->b;
    uint64_t page = run->first_page + i;
    uint32_t count = page_node_count(&b->format, page),
             stride = graph_record_words(b->graph->max_degree);

    run->degrees[i] = 0;
    for (uint32_t slot = 0; slot < count; slot++) {
        uint32_t place = b->order[page * b->format.capacity + slot];
        uint8_t *vector = s->vectors + (uint64_t)slot * b->format.vector_bytes;
        uint32_t *record = s->records + (uint64_t)slot * stride;

        if (row_store_read_raw(b->row_store, place, 1, s->raw, &s->error) < 0 ||
            graph_store_read(b->graph, place, 1, record, &s->error) < 0)
            return -1;
        store_row(b, s->raw, s->floats, vector);
        for (uint32_t e = 0; e < record[0]; e++)
            record[1 + e] = b->positions[record[1 + e]];
        run->degrees[i] += record[0];
        s->nodes[slot] = (struct page_node){.vector = vector,
                                            .key = build_row_key(b, b->numbers[place]),
                                            .row = b->numbers[place],
                                            .neighbours = record + 1,
                                            .degree = record[0]};
    }
    return page_encode(&b->format, page, s->nodes,
                       run->payload + i * (b->format.page_bytes - BLOCK_CRC_BYTES), &run->kept[i],
                       &run->given[i], &s->error);
}

static void page_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct page_run *run = context;

    for (uint64_t i = begin; i < end; i++)
        if (encode_page(run, &run->scratch[worker], i) < 0)
            __atomic_store_n(&run->failed, true, __ATOMIC_RELAXED);
}

static void page_run_free(struct page_run *run, uint32_t workers)
{
    if (!run)
        return;
    for (uint32_t i = 0; run->scratch && i < workers; i++) {
        free(run->scratch[i].nodes);
        free(run->scratch[i].vectors);
        free(run->scratch[i].raw);
        free(run->scratch[i].floats);
        free(run->scratch[i].records);
    }
    free(run->scratch);
    free(run->payload);
    free(run);
}

static struct page_run *page_run_new(struct build *b, uint32_t workers, struct error *err)
{
    uint32_t capacity = b->format.capacity;
    struct page_run *run = calloc(1, sizeof *run);

    if (!run)
        goto nomem;
    run->b = b;
    run->payload = malloc((uint64_t)PAGE_RUN * b->format.page_bytes);
    run->scratch = calloc(workers, sizeof *run->scratch);
    if (!run->payload || !run->scratch)
        goto nomem;
    for (uint32_t i = 0; i < workers; i++) {
        struct page_scratch *s = &run->scratch[i];

        s->nodes = calloc(capacity, sizeof *s->nodes);
        s->vectors = malloc((uint64_t)capacity * b->format.vector_bytes);
        s->raw = malloc(b->shape.raw_bytes);
        s->floats = malloc(b->dim * sizeof *s->floats);
        s->records = malloc((uint64_t)capacity * graph_record_words(b->graph->max_degree) *
                            sizeof *s->records);
        if (!s->nodes || !s->vectors || !s->raw || !s->floats || !s->records)
            goto nomem;
    }
    return run;
nomem:
    page_run_free(run, workers);
    error_set(err, ERR_NOMEM, "no memory for a run of pages");
    return NULL;
}

/* Sums over the pages written so far; they stand in the manifest, so that a checkpoint has them. */
struct page_sums {
    uint64_t kept;
    uint64_t given;
    uint64_t degrees;
};

static int sums_set(struct build *b, const struct page_sums *sums, struct error *err)
{
    struct manifest *m = segment_writer_manifest(b->writer);

    if (manifest_set_u64(m, "field.0.edges", sums->kept, err) < 0 ||
        manifest_set_u64(m, "field.0.edges_given", sums->given, err) < 0)
        return -1;
    return manifest_set_u64(m, "field.0.edges_of_graph", sums->degrees, err);
}

static int sums_get(struct build *b, struct page_sums *sums, struct error *err)
{
    const struct manifest *m = segment_writer_manifest(b->writer);

    if (manifest_get_u64(m, "field.0.edges", &sums->kept, err) < 0 ||
        manifest_get_u64(m, "field.0.edges_given", &sums->given, err) < 0)
        return -1;
    return manifest_get_u64(m, "field.0.edges_of_graph", &sums->degrees, err);
}

static int write_pages(struct build *b, struct error *err)
{
    uint32_t payload = b->format.page_bytes - BLOCK_CRC_BYTES;
    uint32_t workers = b->pool ? pool_workers(b->pool) : 1;
    uint64_t pages = b->format.page_count, written = 0;
    struct page_run *run = page_run_new(b, workers, err);
    struct page_sums sums = {0};
    int rc = -1;

    job_phase(b->job, "pages", pages);
    if (!run || segment_writer_begin_at(b->writer, "f0.pages", SECTION_PAGES, b->format.page_bytes,
                                        b->job, &written, err) < 0)
        goto done;
    if (written && sums_get(b, &sums, err) < 0)
        goto done;
    job_advance(b->job, written / payload, NULL);
    for (uint64_t first = written / payload; first < pages; first += PAGE_RUN) {
        uint64_t count = pages - first < PAGE_RUN ? pages - first : PAGE_RUN;

        run->first_page = first;
        memset(run->kept, 0, sizeof run->kept);
        memset(run->given, 0, sizeof run->given);
        pool_for(b->pool, count, 4, page_range, run);
        for (uint32_t i = 0; run->failed && i < workers; i++) {
            if (run->scratch[i].error.code == ERR_NONE)
                continue;
            *err = run->scratch[i].error;
            goto done;
        }
        for (uint64_t i = 0; i < count; i++) {
            sums.kept += run->kept[i];
            sums.given += run->given[i];
            sums.degrees += run->degrees[i];
        }
        if (segment_writer_append(b->writer, run->payload, count * payload, err) < 0 ||
            sums_set(b, &sums, err) < 0 || checkpoint(b, err) < 0 ||
            job_advance(b->job, count, err) < 0)
            goto done;
    }
    rc = segment_writer_end(b->writer, err);
done:
    page_run_free(run, workers);
    return rc;
}

/* ---- originals, rows, keys ---- */

static int write_originals(struct build *b, struct error *err)
{
    uint64_t row_bytes = b->shape.raw_bytes, written = 0;
    uint8_t *raw = malloc(ENCODE_ROWS * row_bytes);
    struct gather gather = {.b = b, .raw = raw};
    int rc = -1;

    job_phase(b->job, "originals", b->count);
    if (!raw)
        return error_set(err, ERR_NOMEM, "no memory for a block of vectors");
    if (segment_writer_begin_at(b->writer, "f0.vectors", SECTION_VECTORS, FILE_BLOCK_BYTES, b->job,
                                &written, err) < 0)
        goto done;
    for (uint64_t first = written / row_bytes; first < b->count;) {
        uint32_t rows = (uint32_t)(b->count - first < ENCODE_ROWS ? b->count - first : ENCODE_ROWS);
        uint64_t skip = written > first * row_bytes ? written - first * row_bytes : 0;

        if (gather_rows(&gather, (uint32_t)first, rows, err) < 0 ||
            segment_writer_append(b->writer, raw + skip, rows * row_bytes - skip, err) < 0 ||
            checkpoint(b, err) < 0 || job_advance(b->job, rows, err) < 0)
            goto done;
        first += rows;
    }
    rc = segment_writer_end(b->writer, err);
done:
    free(raw);
    return rc;
}

static int write_rows(struct build *b, struct error *err)
{
    struct rows_writer *rows = NULL;
    struct record_buffer record = {0};
    int rc = -1;

    job_phase(b->job, "rows", b->count);
    if (segment_writer_begin(b->writer, "rows", SECTION_ROWS, FILE_BLOCK_BYTES, err) < 0 ||
        rows_writer_new(b->writer, &rows, err) < 0)
        goto done;
    for (uint32_t position = 0; position < b->count; position++) {
        if (b->rows->record(b->rows->context, b->numbers[b->order[position]], &record, err) < 0 ||
            rows_writer_append(rows, record.data, record.bytes, err) < 0 ||
            (position % 1024 == 1023 && job_advance(b->job, 1024, err) < 0))
            goto done;
    }
    if (rows_writer_finish(rows, err) < 0)
        goto done;
    rc = segment_writer_end(b->writer, err);
done:
    record_release(&record);
    rows_writer_free(rows);
    return rc;
}

static int compare_entries(const void *a, const void *b)
{
    const struct key_entry *x = a, *y = b;

    if (x->ordinal != y->ordinal)
        return x->ordinal < y->ordinal ? -1 : 1;
    return (x->position > y->position) - (x->position < y->position);
}

/* The sorted entries of all keys, numbered by position; by row while there is no order yet. Keys
 * that are row numbers need no sort: they are put in their places. */
static struct key_entry *key_entries(const struct build *b, struct error *err)
{
    struct key_entry *entries = malloc((uint64_t)b->count * sizeof *entries);
    bool by_number = !b->rows->text_keys && !b->rows->int64_keys;

    if (!entries) {
        error_set(err, ERR_NOMEM, "no memory for %u keys", b->count);
        return NULL;
    }
    for (uint32_t i = 0; i < b->count; i++) {
        uint32_t row = b->order ? b->numbers[b->order[i]] : i;
        struct key_entry *entry = &entries[by_number ? row : i];

        entry->position = i;
        entry->ordinal = b->rows->text_keys
                             ? key_hash(b->rows->text_keys[row], strlen(b->rows->text_keys[row]))
                             : key_ordinal_int64(build_row_key(b, row));
    }
    if (!by_number)
        qsort(entries, b->count, sizeof *entries, compare_entries);
    return entries;
}

/* Equal hashes of text keys are told apart by the texts. */
int duplicates_refuse(const struct build *b, struct error *err)
{
    struct key_entry *entries;
    int rc = -1;

    if (!b->rows->text_keys && !b->rows->int64_keys)
        return 0;
    entries = key_entries(b, err);
    if (!entries)
        return -1;
    for (uint32_t i = 1; i < b->count; i++)
        for (uint32_t j = i; j > 0 && entries[j - 1].ordinal == entries[i].ordinal; j--) {
            uint32_t low = entries[j - 1].position, high = entries[i].position;

            if (!b->rows->text_keys) {
                error_set(err, ERR_INVALID, "key %" PRId64 " stands twice: in rows %u and %u",
                          build_row_key(b, low), low, high);
                goto done;
            }
            if (!strcmp(b->rows->text_keys[low], b->rows->text_keys[high])) {
                error_set(err, ERR_INVALID, "key '%.200s' stands twice: in rows %u and %u",
                          b->rows->text_keys[low], low, high);
                goto done;
            }
        }
    rc = 0;
done:
    free(entries);
    return rc;
}

static int write_keys(struct build *b, struct error *err)
{
    struct key_entry *entries;
    int rc = -1;

    job_phase(b->job, "keys", b->count);
    entries = key_entries(b, err);
    if (!entries)
        return -1;
    if (segment_writer_begin(b->writer, "keys", SECTION_KEYS, FILE_BLOCK_BYTES, err) < 0 ||
        keys_write(b->writer, entries, b->count, err) < 0)
        goto done;
    rc = segment_writer_end(b->writer, err);
done:
    free(entries);
    return rc;
}

/* ---- all of them ---- */

int segment_parts_write(struct build *b, struct error *err)
{
    struct segment_writer *w = b->writer;

    if ((!segment_writer_has(w, "f0.cells") && write_codes(b, err) < 0) ||
        (!segment_writer_has(w, "f0.quantiser") && write_quantiser(b, err) < 0) ||
        (!segment_writer_has(w, "f0.pages") && write_pages(b, err) < 0))
        return -1;
    if (b->params.keep_originals && !b->exact_pages && !segment_writer_has(w, "f0.vectors") &&
        write_originals(b, err) < 0)
        return -1;
    if (b->rows->record && !segment_writer_has(w, "rows") && write_rows(b, err) < 0)
        return -1;
    if (!segment_writer_has(w, "keys") && write_keys(b, err) < 0)
        return -1;
    return segment_writer_checkpoint(w, NULL, err);
}

uint64_t segment_parts_memory_bytes(uint64_t count, uint32_t dim, uint64_t raw_bytes,
                                    uint32_t max_degree, uint32_t workers)
{
    uint64_t block = (uint64_t)ENCODE_ROWS * (dim * 4ull + raw_bytes + dim);
    /* qsort takes as much again as the entries. */
    uint64_t keys = count * sizeof(struct key_entry) * 2;
    uint64_t pages = (uint64_t)PAGE_RUN * 4096 * (1 + raw_bytes / 4096) +
                     workers * (64ull << 10) * (1 + max_degree / 64 + raw_bytes / 4096);

    block = block > pages ? block : pages;
    return (keys > block ? keys : block) + (8u << 20);
}
