/* Opening reads the field's parameters from the segment's manifest, checks every number against
 * the sections' real sizes, then loads codes, quantiser, cells and calibration, and fills what the
 * budget leaves with pages from the front of the file. */
#include "index/disk_index.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "storage/base/bytes.h"
#include "storage/file.h"

#define LOAD_BYTES (1u << 20)
#define HUGE_BYTES (2u << 20)
/* Keys and vectors are fetched in bursts of so many pages. */
#define FETCH_PAGES 64u

static int field_u64(const struct segment *segment, uint32_t field, const char *name, uint64_t min,
                     uint64_t max, uint64_t *value, struct error *err)
{
    char entry[64];

    snprintf(entry, sizeof entry, "field.%u.%s", field, name);
    return manifest_get_u64_in(segment_manifest(segment), entry, min, max, value, err);
}

static const struct segment_section *field_section(const struct segment *segment, uint32_t field,
                                                   const char *kind)
{
    char name[SECTION_NAME_MAX];

    snprintf(name, sizeof name, "f%u.%s", field, kind);
    return segment_find(segment, name);
}

static int section_wanted(const struct segment *segment, uint32_t field, const char *kind,
                          uint64_t payload_bytes, const struct segment_section **out,
                          struct error *err)
{
    *out = field_section(segment, field, kind);
    if (!*out)
        return error_set(err, ERR_CORRUPT, "%s has no section f%u.%s", segment_path(segment), field,
                         kind);
    if (payload_bytes && (*out)->payload_bytes != payload_bytes)
        return error_set(err, ERR_CORRUPT, "%s/%s holds %llu bytes, the parameters say %llu",
                         segment_path(segment), (*out)->name,
                         (unsigned long long)(*out)->payload_bytes,
                         (unsigned long long)payload_bytes);
    return 0;
}

/* Fills everything that needs no payload. */
static int parameters_read(struct disk_index *index, const struct segment *segment, uint32_t field,
                           const struct segment_section **codes,
                           const struct segment_section **quantiser, struct error *err)
{
    uint64_t rows = segment_row_count(segment);
    uint64_t dim, element, metric, store, code_bytes, page_bytes, capacity, degree, entry, keys,
        positions, normalised, exact, zeros, cell_pages;

    if (rows < 1 || rows > UINT32_MAX)
        return error_set(err, ERR_CORRUPT, "%s says %llu rows", segment_path(segment),
                         (unsigned long long)rows);
    if (field_u64(segment, field, "dim", 1, DISTANCE_DIM_MAX, &dim, err) < 0 ||
        field_u64(segment, field, "element", 1, 16, &element, err) < 0 ||
        field_u64(segment, field, "metric", 1, 16, &metric, err) < 0 ||
        field_u64(segment, field, "store", 1, 64, &store, err) < 0 ||
        field_u64(segment, field, "code_bytes", 1, dim + 1, &code_bytes, err) < 0 ||
        field_u64(segment, field, "page_bytes", FILE_BLOCK_BYTES, PAGE_BYTES_MAX, &page_bytes,
                  err) < 0 ||
        field_u64(segment, field, "page_capacity", 1, PAGE_CAPACITY_MAX, &capacity, err) < 0 ||
        field_u64(segment, field, "max_degree", 1, PAGE_DEGREE_MAX, &degree, err) < 0 ||
        field_u64(segment, field, "entry_point", 0, rows - 1, &entry, err) < 0 ||
        field_u64(segment, field, "page_holds_keys", 0, 1, &keys, err) < 0 ||
        field_u64(segment, field, "page_holds_rows", 0, 1, &positions, err) < 0 ||
        field_u64(segment, field, "normalised", 0, 1, &normalised, err) < 0 ||
        field_u64(segment, field, "exact_pages", 0, 1, &exact, err) < 0 ||
        field_u64(segment, field, "zero_vectors", 0, rows, &zeros, err) < 0 ||
        field_u64(segment, field, "cell_pages", 1, UINT32_MAX / PAGE_CAPACITY_MAX, &cell_pages,
                  err) < 0)
        return -1;
    if (element_bytes((enum element_type)element, (uint32_t)dim) == 0 || metric > METRIC_COSINE)
        return error_set(err, ERR_UNSUPPORTED,
                         "%s: field %u has element type %llu and metric %llu, which this program "
                         "does not know",
                         segment_path(segment), field, (unsigned long long)element,
                         (unsigned long long)metric);
    index->segment = segment;
    index->field = field;
    index->dim = (uint32_t)dim;
    index->element = (enum element_type)element;
    index->metric = (enum metric)metric;
    index->code_bytes = (uint32_t)code_bytes;
    index->row_count = (uint32_t)rows;
    index->entry_point = (uint32_t)entry;
    index->max_degree = (uint32_t)degree;
    index->cell_pages = (uint32_t)cell_pages;
    index->page_reciprocal = UINT64_MAX / capacity + 1;
    index->cell_reciprocal = UINT64_MAX / cell_pages + 1;
    index->normalised = normalised;
    index->exact_pages = exact;
    index->zero_vector_count = zeros;
    index->format.store = (enum vector_store)store;
    index->format.metric = index->metric;
    index->format.dim = index->dim;
    index->format.vector_bytes =
        store_vector_bytes((enum vector_store)store, index->metric, index->dim);
    index->format.capacity = (uint32_t)capacity;
    index->format.page_bytes = (uint32_t)page_bytes;
    index->format.row_count = rows;
    index->format.page_count = (rows + capacity - 1) / capacity;
    index->format.holds_keys = keys;
    index->format.holds_rows = positions;
    if (page_format_check(&index->format, err) < 0)
        return error_prefix(err, "%s", segment_path(segment));
    if (section_wanted(segment, field, "pages",
                       index->format.page_count * (page_bytes - BLOCK_CRC_BYTES), &index->pages,
                       err) < 0 ||
        section_wanted(segment, field, "codes", rows * code_bytes, codes, err) < 0 ||
        section_wanted(segment, field, "quantiser", 0, quantiser, err) < 0)
        return -1;
    if (index->pages->block_bytes != page_bytes)
        return error_set(err, ERR_CORRUPT, "%s/%s has blocks of %u bytes, the parameters say %llu",
                         segment_path(segment), index->pages->name, index->pages->block_bytes,
                         (unsigned long long)page_bytes);
    index->originals = field_section(segment, field, "vectors");
    if (index->originals &&
        index->originals->payload_bytes != rows * element_bytes(index->element, index->dim))
        return error_set(err, ERR_CORRUPT, "%s/%s holds %llu bytes, %llu rows need %llu",
                         segment_path(segment), index->originals->name,
                         (unsigned long long)index->originals->payload_bytes,
                         (unsigned long long)rows,
                         (unsigned long long)(rows * element_bytes(index->element, index->dim)));
    if ((*quantiser)->payload_bytes > (UINT64_C(1) << 30))
        return error_set(err, ERR_CORRUPT, "%s/%s is %llu bytes long", segment_path(segment),
                         (*quantiser)->name, (unsigned long long)(*quantiser)->payload_bytes);
    return 0;
}

/* A whole section that is small enough to be held twice for a moment. */
static int section_read(const struct segment *segment, const struct segment_section *section,
                        uint8_t **out, struct error *err)
{
    uint8_t *bytes;

    if (section->payload_bytes > (UINT64_C(1) << 34))
        return error_set(err, ERR_CORRUPT, "%s/%s is %llu bytes long", segment_path(segment),
                         section->name, (unsigned long long)section->payload_bytes);
    bytes = malloc(section->payload_bytes ? section->payload_bytes : 1);
    if (!bytes)
        return error_set(err, ERR_NOMEM, "no memory for %s", section->name);
    if (segment_read(segment, section, 0, section->payload_bytes, bytes, err) < 0) {
        free(bytes);
        return -1;
    }
    *out = bytes;
    return 0;
}

static int quantiser_load(struct disk_index *index, const struct segment_section *section,
                          struct error *err)
{
    uint8_t *bytes = NULL;
    int rc = -1;

    if (section_read(index->segment, section, &bytes, err) < 0 ||
        quantiser_decode_bytes(bytes, section->payload_bytes, segment_path(index->segment),
                               &index->quantiser, err) < 0)
        goto done;
    if (quantiser_dim(index->quantiser) != index->dim ||
        quantiser_code_bytes(index->quantiser) != index->code_bytes) {
        error_set(err, ERR_CORRUPT, "%s/%s is for %u dimensions and %u bytes, wanted %u and %u",
                  segment_path(index->segment), section->name, quantiser_dim(index->quantiser),
                  quantiser_code_bytes(index->quantiser), index->dim, index->code_bytes);
        goto done;
    }
    rc = 0;
done:
    free(bytes);
    return rc;
}

static int cells_load(struct disk_index *index, struct error *err)
{
    const struct segment_section *section;
    uint64_t rows = (uint64_t)index->cell_pages * index->format.capacity;
    uint64_t count = (index->row_count + rows - 1) / rows;
    uint8_t *bytes = NULL;
    int rc = -1;

    if (section_wanted(index->segment, index->field, "cells", 0, &section, err) < 0 ||
        section_read(index->segment, section, &bytes, err) < 0 ||
        cells_decode_bytes(bytes, section->payload_bytes, segment_path(index->segment),
                           &index->cells, err) < 0)
        goto done;
    if (cells_rows(index->cells) != rows || cells_count(index->cells) != count ||
        cells_dim(index->cells) != index->dim) {
        error_set(err, ERR_CORRUPT,
                  "%s/%s has %u cells of %u rows and %u dimensions, wanted %llu of %llu and %u",
                  segment_path(index->segment), section->name, cells_count(index->cells),
                  cells_rows(index->cells), cells_dim(index->cells), (unsigned long long)count,
                  (unsigned long long)rows, index->dim);
        goto done;
    }
    rc = 0;
done:
    free(bytes);
    return rc;
}

static int calibration_load(struct disk_index *index, struct error *err)
{
    const struct segment_section *section =
        field_section(index->segment, index->field, "calibration");
    uint8_t *bytes = NULL;
    int rc = -1;

    if (!section)
        return 0;
    index->calibration = malloc(sizeof *index->calibration);
    if (!index->calibration)
        return error_set(err, ERR_NOMEM, "no memory for the calibration");
    if (section_read(index->segment, section, &bytes, err) < 0 ||
        walk_calibration_decode(bytes, section->payload_bytes, segment_path(index->segment),
                                index->calibration, err) < 0)
        goto done;
    rc = 0;
done:
    free(bytes);
    return rc;
}

/* What is loaded besides codes and pages. */
static int tables_load(struct disk_index *index, const struct segment_section *quantiser,
                       uint64_t *bytes, struct error *err)
{
    if (quantiser_load(index, quantiser, err) < 0 || cells_load(index, err) < 0 ||
        calibration_load(index, err) < 0)
        return -1;
    *bytes = quantiser_memory_bytes(index->quantiser) + cells_memory_bytes(index->cells) +
             (index->calibration ? sizeof *index->calibration : 0) + sizeof *index;
    return 0;
}

int disk_index_memory_min(const struct segment *segment, uint32_t field, uint64_t *bytes,
                          struct error *err)
{
    const struct segment_section *codes, *quantiser;
    struct disk_index *index = calloc(1, sizeof *index);
    uint64_t tables;
    int rc = -1;

    if (!index)
        return error_set(err, ERR_NOMEM, "no memory for an index");
    if (parameters_read(index, segment, field, &codes, &quantiser, err) < 0 ||
        tables_load(index, quantiser, &tables, err) < 0)
        goto done;
    *bytes = codes->payload_bytes + tables;
    rc = 0;
done:
    disk_index_close(index);
    return rc;
}

/* Memory that is read at random all over: huge pages spare most of the address look-ups. */
static uint8_t *random_access_alloc(uint64_t bytes)
{
    void *memory;
    uint64_t rounded = (bytes + HUGE_BYTES - 1) & ~(uint64_t)(HUGE_BYTES - 1);

    if (bytes < 4 * HUGE_BYTES)
        return file_buffer_alloc(bytes ? bytes : 1);
    if (posix_memalign(&memory, HUGE_BYTES, bytes))
        return NULL;
    /* Only whole ones: the last would take up memory beyond what was granted. */
    madvise(memory, rounded - (rounded > bytes ? HUGE_BYTES : 0), MADV_HUGEPAGE);
    return memory;
}

static int resident_load(struct disk_index *index, uint64_t budget, struct error *err)
{
    uint32_t page_bytes = index->format.page_bytes;
    uint64_t count = budget / page_bytes;

    if (count > index->format.page_count)
        count = index->format.page_count;
    if (!count)
        return 0;
    index->resident_pages = random_access_alloc(count * page_bytes);
    if (!index->resident_pages)
        return error_set(err, ERR_NOMEM, "no memory for %llu resident pages",
                         (unsigned long long)count);
    for (uint64_t page = 0; page < count;) {
        uint64_t run = LOAD_BYTES / page_bytes;
        uint8_t *into = index->resident_pages + page * page_bytes;

        if (run < 1)
            run = 1;
        if (run > count - page)
            run = count - page;
        if (file_read_exact(index->pages->file, index->pages->path, into, run * page_bytes,
                            segment_block_offset(index->pages, page), err) < 0)
            return -1;
        for (uint64_t i = 0; i < run; i++)
            if (segment_block_check(index->segment, index->pages, page + i, into + i * page_bytes,
                                    err) < 0)
                return -1;
        page += run;
    }
    index->resident_page_count = count;
    return 0;
}

int disk_index_open(const struct segment *segment, uint32_t field, uint64_t memory_bytes,
                    struct disk_index **out, struct error *err)
{
    const struct segment_section *codes, *quantiser;
    int rc = -1;
    uint64_t tables, needed;
    struct disk_index *index = calloc(1, sizeof *index);

    if (!index)
        return error_set(err, ERR_NOMEM, "no memory for an index");
    index->kernels = distance_kernels_best();
    if (parameters_read(index, segment, field, &codes, &quantiser, err) < 0 ||
        tables_load(index, quantiser, &tables, err) < 0)
        goto done;
    needed = codes->payload_bytes + tables;

    if (memory_bytes && memory_bytes < needed) {
        error_set(err, ERR_BUDGET,
                  "%s needs %llu bytes of memory (codes %llu, tables %llu), %llu were granted",
                  segment_path(segment), (unsigned long long)needed,
                  (unsigned long long)codes->payload_bytes, (unsigned long long)tables,
                  (unsigned long long)memory_bytes);
        error_remedy(err, "grant more, or build with fewer --code-bytes (now %u)",
                     index->code_bytes);
        goto done;
    }
    index->codes = random_access_alloc(codes->payload_bytes);
    if (!index->codes) {
        error_set(err, ERR_NOMEM, "no memory for %llu bytes of codes",
                  (unsigned long long)codes->payload_bytes);
        goto done;
    }
    for (uint64_t offset = 0; offset < codes->payload_bytes; offset += LOAD_BYTES) {
        uint64_t bytes = codes->payload_bytes - offset;

        if (bytes > LOAD_BYTES)
            bytes = LOAD_BYTES;
        if (segment_read(segment, codes, offset, bytes, index->codes + offset, err) < 0)
            goto done;
    }
    if (memory_bytes && resident_load(index, memory_bytes - needed, err) < 0)
        goto done;
    index->memory_bytes = needed + index->resident_page_count * index->format.page_bytes;
    *out = index;
    index = NULL; /* moved to the caller */
    rc = 0;
done:
    disk_index_close(index);
    return rc;
}

void disk_index_close(struct disk_index *index)
{
    if (!index)
        return;
    quantiser_free(index->quantiser);
    cells_free(index->cells);
    free(index->calibration);
    free(index->codes);
    free(index->resident_pages);
    free(index);
}

bool disk_index_has_vectors(const struct disk_index *index)
{
    return index->originals || index->exact_pages;
}

/* Calls `use` with the view of each position's page, reading pages in bursts. */
typedef void (*page_use_fn)(const struct disk_index *index, const struct page_view *view,
                            uint32_t slot, uint32_t i, void *context);

static int pages_visit(const struct disk_index *index, struct reader *reader,
                       const uint32_t *positions, uint32_t count, page_use_fn use, void *context,
                       struct error *err)
{
    uint32_t payload = index->format.page_bytes - BLOCK_CRC_BYTES;
    struct segment_span spans[FETCH_PAGES];
    uint8_t *buffer = malloc((size_t)FETCH_PAGES * payload);
    int rc = -1;

    if (!buffer)
        return error_set(err, ERR_NOMEM, "no memory for a burst of pages");
    for (uint32_t begin = 0; begin < count; begin += FETCH_PAGES) {
        uint32_t burst = count - begin < FETCH_PAGES ? count - begin : FETCH_PAGES;

        for (uint32_t i = 0; i < burst; i++) {
            uint64_t page = positions[begin + i] / index->format.capacity;

            if (positions[begin + i] >= index->row_count) {
                error_set(err, ERR_INVALID, "row position %u is beyond the last of %u",
                          positions[begin + i], index->row_count);
                goto done;
            }
            spans[i] = (struct segment_span){index->pages, page * payload, payload,
                                             buffer + (size_t)i * payload};
        }
        if (segment_read_spans(index->segment, reader, spans, burst, NULL, err) < 0)
            goto done;
        for (uint32_t i = 0; i < burst; i++) {
            struct page_view view;
            uint64_t page = positions[begin + i] / index->format.capacity;

            if (page_view_open(&index->format, page, spans[i].out, &view, err) < 0) {
                error_prefix(err, "%s", index->pages->path);
                goto done;
            }
            use(index, &view, positions[begin + i] % index->format.capacity, begin + i, context);
        }
    }
    rc = 0;
done:
    free(buffer);
    return rc;
}

static void use_vector(const struct disk_index *index, const struct page_view *view, uint32_t slot,
                       uint32_t i, void *context)
{
    uint64_t bytes = element_bytes(index->element, index->dim);
    const uint8_t *stored = page_view_vector(view, slot);

    /* Integer cosine keeps a norm before the elements. */
    memcpy((uint8_t *)context + i * bytes, stored + (index->format.vector_bytes - bytes), bytes);
}

int disk_index_vectors(const struct disk_index *index, struct reader *reader,
                       const uint32_t *positions, uint32_t count, void *out, struct error *err)
{
    uint64_t bytes = element_bytes(index->element, index->dim);

    if (index->exact_pages)
        return pages_visit(index, reader, positions, count, use_vector, out, err);
    if (!index->originals)
        return error_set(err, ERR_NOT_FOUND,
                         "the original vectors were dropped when this index was built "
                         "(--no-originals); pages hold %s approximations",
                         store_name(index->format.store));
    for (uint32_t begin = 0; begin < count; begin += FETCH_PAGES) {
        uint32_t burst = count - begin < FETCH_PAGES ? count - begin : FETCH_PAGES;
        struct segment_span spans[FETCH_PAGES];

        for (uint32_t i = 0; i < burst; i++) {
            if (positions[begin + i] >= index->row_count)
                return error_set(err, ERR_INVALID, "row position %u is beyond the last of %u",
                                 positions[begin + i], index->row_count);
            spans[i] = (struct segment_span){index->originals, positions[begin + i] * bytes,
                                             (uint32_t)bytes, (uint8_t *)out + (begin + i) * bytes};
        }
        if (segment_read_spans(index->segment, reader, spans, burst, NULL, err) < 0)
            return -1;
    }
    return 0;
}

static void use_key(const struct disk_index *index, const struct page_view *view, uint32_t slot,
                    uint32_t i, void *context)
{
    (void)index;
    ((int64_t *)context)[i] = page_view_key(view, slot);
}

int disk_index_keys(const struct disk_index *index, struct reader *reader,
                    const uint32_t *positions, uint32_t count, int64_t *out, struct error *err)
{
    if (!index->format.holds_keys)
        return error_set(err, ERR_INVALID, "%s holds no int64 keys", index->pages->path);
    return pages_visit(index, reader, positions, count, use_key, out, err);
}
