/* How it works: the writer fills one frame's worth of records, compresses it and remembers where it
 * went; reading, a position's frame is found by binary search in the resident table, each wanted
 * frame is read and decompressed once, and only the wanted records are kept. `keys` is the same
 * idea without compression: a run of 341 entries is 4,092 bytes, one block's payload, and the
 * resident fences say which run an ordinal can be in.
 *
 * Everything read back is checked before it is used as an offset, a length or a count. */
#include "index/rows.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "storage/base/bytes.h"

#define FRAME_RAW_BYTES 16384u
#define FRAME_RAW_BYTES_MAX (RECORD_BYTES_MAX + 4u) /* a record of the largest size, alone */
#define ZSTD_LEVEL 3
#define TABLE_ENTRY_BYTES 12u
#define ROWS_TAIL_BYTES 24u
#define KEY_ENTRY_BYTES 12u
#define RUN_ENTRIES 341u
#define RUN_BYTES (RUN_ENTRIES * KEY_ENTRY_BYTES)
#define KEYS_TAIL_BYTES 16u
#define BATCH_BYTES_MAX (8u << 20) /* of compressed frames, or of runs, in memory at once */

/* ---- writing rows ---- */

struct rows_writer {
    struct segment_writer *writer;
    ZSTD_CCtx *zstd;
    uint8_t *records; /* of the frame being filled, FRAME_RAW_BYTES_MAX */
    uint32_t records_bytes;
    uint32_t ends[FRAME_RAW_BYTES / 4];
    uint32_t end_count;
    uint8_t *raw;        /* ends and records together, FRAME_RAW_BYTES_MAX */
    uint8_t *compressed; /* compressed_bytes_max */
    size_t compressed_bytes_max;
    uint64_t *offsets; /* per frame written */
    uint32_t *first_rows;
    uint64_t frame_count;
    uint64_t frame_capacity;
    uint64_t row_count;
};

int rows_writer_new(struct segment_writer *writer, struct rows_writer **out, struct error *err)
{
    struct rows_writer *rows = calloc(1, sizeof *rows);

    *out = NULL;
    if (!rows)
        return error_set(err, ERR_NOMEM, "no memory to write rows");
    rows->writer = writer;
    rows->compressed_bytes_max = ZSTD_compressBound(FRAME_RAW_BYTES_MAX);
    rows->zstd = ZSTD_createCCtx();
    rows->records = malloc(FRAME_RAW_BYTES_MAX);
    rows->raw = malloc(FRAME_RAW_BYTES_MAX);
    rows->compressed = malloc(rows->compressed_bytes_max);
    if (!rows->zstd || !rows->records || !rows->raw || !rows->compressed) {
        rows_writer_free(rows);
        return error_set(err, ERR_NOMEM, "no memory to write rows");
    }
    *out = rows;
    return 0;
}

void rows_writer_free(struct rows_writer *rows)
{
    if (!rows)
        return;
    ZSTD_freeCCtx(rows->zstd);
    free(rows->records);
    free(rows->raw);
    free(rows->compressed);
    free(rows->offsets);
    free(rows->first_rows);
    free(rows);
}

/* Room for one more entry of the frame table. */
static int table_grow(struct rows_writer *rows, struct error *err)
{
    uint64_t capacity = rows->frame_capacity ? 2 * rows->frame_capacity : 256;
    uint64_t *offsets;
    uint32_t *first_rows;

    if (rows->frame_count < rows->frame_capacity)
        return 0;
    offsets = realloc(rows->offsets, capacity * sizeof *offsets);
    if (offsets)
        rows->offsets = offsets;
    first_rows = realloc(rows->first_rows, capacity * sizeof *first_rows);
    if (first_rows)
        rows->first_rows = first_rows;
    if (!offsets || !first_rows)
        return error_set(err, ERR_NOMEM, "no memory for the table of %" PRIu64 " frames", capacity);
    rows->frame_capacity = capacity;
    return 0;
}

static int frame_flush(struct rows_writer *rows, struct error *err)
{
    size_t ends_bytes = 4 * (size_t)rows->end_count;
    size_t compressed_bytes;

    if (rows->end_count == 0)
        return 0;
    if (table_grow(rows, err) < 0)
        return -1;
    for (uint32_t i = 0; i < rows->end_count; i++)
        store_u32(rows->raw + 4 * (size_t)i, rows->ends[i]);
    memcpy(rows->raw + ends_bytes, rows->records, rows->records_bytes);
    /* The content size is part of the frame by default; readers insist on it. */
    compressed_bytes = ZSTD_compressCCtx(rows->zstd, rows->compressed, rows->compressed_bytes_max,
                                         rows->raw, ends_bytes + rows->records_bytes, ZSTD_LEVEL);
    if (ZSTD_isError(compressed_bytes))
        return error_set(err, ERR_INTERNAL, "compressing %u rows: %s", rows->end_count,
                         ZSTD_getErrorName(compressed_bytes));
    rows->offsets[rows->frame_count] = segment_writer_offset(rows->writer);
    rows->first_rows[rows->frame_count] = (uint32_t)(rows->row_count - rows->end_count);
    if (segment_writer_append(rows->writer, rows->compressed, compressed_bytes, err) < 0)
        return -1;
    rows->frame_count++;
    rows->end_count = 0;
    rows->records_bytes = 0;
    return 0;
}

int rows_writer_append(struct rows_writer *rows, const uint8_t *record, size_t bytes,
                       struct error *err)
{
    if (bytes > RECORD_BYTES_MAX)
        return error_set(err, ERR_INVALID,
                         "the record of row %" PRIu64 " has %zu bytes, %u are allowed",
                         rows->row_count, bytes, RECORD_BYTES_MAX);
    if (rows->row_count == UINT32_MAX)
        return error_set(err, ERR_INVALID, "more than %u rows in one segment", UINT32_MAX);
    if (4 * ((size_t)rows->end_count + 1) + rows->records_bytes + bytes > FRAME_RAW_BYTES &&
        frame_flush(rows, err) < 0)
        return -1;
    if (bytes)
        memcpy(rows->records + rows->records_bytes, record, bytes);
    rows->records_bytes += (uint32_t)bytes;
    rows->ends[rows->end_count++] = rows->records_bytes;
    rows->row_count++;
    return 0;
}

int rows_writer_finish(struct rows_writer *rows, struct error *err)
{
    uint8_t entry[TABLE_ENTRY_BYTES], tail[ROWS_TAIL_BYTES];
    uint64_t table_offset;

    if (frame_flush(rows, err) < 0)
        return -1;
    table_offset = segment_writer_offset(rows->writer);
    for (uint64_t i = 0; i < rows->frame_count; i++) {
        store_u64(entry, rows->offsets[i]);
        store_u32(entry + 8, rows->first_rows[i]);
        if (segment_writer_append(rows->writer, entry, sizeof entry, err) < 0)
            return -1;
    }
    store_u64(tail, table_offset);
    store_u64(tail + 8, rows->frame_count);
    store_u64(tail + 16, rows->row_count);
    return segment_writer_append(rows->writer, tail, sizeof tail, err);
}

/* ---- reading rows ---- */

struct rows {
    const struct segment *segment;
    const struct segment_section *section;
    uint64_t frame_count;
    uint64_t row_count;
    uint64_t *offsets;    /* frame_count + 1: the last is the end of the frames */
    uint32_t *first_rows; /* frame_count + 1: the last is row_count */
};

static int table_check(const struct rows *rows, uint64_t frame, struct error *err)
{
    uint64_t from = rows->offsets[frame], to = rows->offsets[frame + 1];

    if (to <= from || to - from > ZSTD_compressBound(FRAME_RAW_BYTES_MAX))
        return error_set(err, ERR_CORRUPT,
                         "%s: frame %" PRIu64 " spans bytes %" PRIu64 " to %" PRIu64,
                         rows->section->path, frame, from, to);
    if (rows->first_rows[frame + 1] <= rows->first_rows[frame])
        return error_set(err, ERR_CORRUPT, "%s: frame %" PRIu64 " spans rows %u to %u",
                         rows->section->path, frame, rows->first_rows[frame],
                         rows->first_rows[frame + 1]);
    return 0;
}

static int table_read(struct rows *rows, uint64_t table_offset, struct error *err)
{
    uint64_t bytes = rows->frame_count * TABLE_ENTRY_BYTES;
    uint8_t *table = malloc(bytes ? bytes : 1);
    int rc = -1;

    rows->offsets = malloc((rows->frame_count + 1) * sizeof *rows->offsets);
    rows->first_rows = malloc((rows->frame_count + 1) * sizeof *rows->first_rows);
    if (!table || !rows->offsets || !rows->first_rows) {
        error_set(err, ERR_NOMEM, "%s: no memory for the table of %" PRIu64 " frames",
                  rows->section->path, rows->frame_count);
        goto done;
    }
    if (segment_read(rows->segment, rows->section, table_offset, bytes, table, err) < 0)
        goto done;
    for (uint64_t i = 0; i < rows->frame_count; i++) {
        rows->offsets[i] = load_u64(table + i * TABLE_ENTRY_BYTES);
        rows->first_rows[i] = load_u32(table + i * TABLE_ENTRY_BYTES + 8);
    }
    rows->offsets[rows->frame_count] = table_offset;
    rows->first_rows[rows->frame_count] = (uint32_t)rows->row_count;
    if (rows->offsets[0] != 0 || rows->first_rows[0] != 0) {
        error_set(err, ERR_CORRUPT, "%s: the frame table does not begin at byte 0 and row 0",
                  rows->section->path);
        goto done;
    }
    for (uint64_t i = 0; i < rows->frame_count; i++)
        if (table_check(rows, i, err) < 0)
            goto done;
    rc = 0;
done:
    free(table);
    return rc;
}

int rows_open(const struct segment *segment, const struct segment_section *section,
              struct rows **out, struct error *err)
{
    struct rows *rows = calloc(1, sizeof *rows);
    uint64_t payload = section->payload_bytes, table_offset;
    uint8_t tail[ROWS_TAIL_BYTES];
    int rc = -1;

    *out = NULL;
    if (!rows)
        return error_set(err, ERR_NOMEM, "%s: no memory to open it", section->path);
    rows->segment = segment;
    rows->section = section;
    if (payload < ROWS_TAIL_BYTES) {
        error_set(err, ERR_CORRUPT, "%s: %" PRIu64 " bytes are too few for a frame table",
                  section->path, payload);
        goto done;
    }
    if (segment_read(segment, section, payload - sizeof tail, sizeof tail, tail, err) < 0)
        goto done;
    table_offset = load_u64(tail);
    rows->frame_count = load_u64(tail + 8);
    rows->row_count = load_u64(tail + 16);
    /* Divided rather than multiplied: a hostile count cannot overflow. */
    if (table_offset > payload - sizeof tail ||
        (payload - sizeof tail - table_offset) % TABLE_ENTRY_BYTES != 0 ||
        rows->frame_count != (payload - sizeof tail - table_offset) / TABLE_ENTRY_BYTES) {
        error_set(err, ERR_CORRUPT,
                  "%s: a table of %" PRIu64 " frames at byte %" PRIu64 " does not fit %" PRIu64
                  " bytes of payload",
                  section->path, rows->frame_count, table_offset, payload);
        goto done;
    }
    if (rows->row_count > UINT32_MAX || rows->row_count != segment_row_count(segment)) {
        error_set(err, ERR_CORRUPT, "%s: holds %" PRIu64 " rows, the segment %" PRIu64,
                  section->path, rows->row_count, segment_row_count(segment));
        goto done;
    }
    if ((rows->frame_count == 0) != (rows->row_count == 0) ||
        (rows->frame_count == 0 && table_offset != 0)) {
        error_set(err, ERR_CORRUPT, "%s: %" PRIu64 " frames for %" PRIu64 " rows", section->path,
                  rows->frame_count, rows->row_count);
        goto done;
    }
    if (rows->frame_count > 0 && table_read(rows, table_offset, err) < 0)
        goto done;
    *out = rows;
    rows = NULL;
    rc = 0;
done:
    rows_close(rows);
    return rc;
}

void rows_close(struct rows *rows)
{
    if (!rows)
        return;
    free(rows->offsets);
    free(rows->first_rows);
    free(rows);
}

uint64_t rows_memory_bytes(const struct rows *rows)
{
    return sizeof *rows +
           (rows->frame_count + 1) * (sizeof *rows->offsets + sizeof *rows->first_rows);
}

/* The frame of a row that is there. */
static uint64_t frame_of(const struct rows *rows, uint32_t row)
{
    uint64_t low = 0, high = rows->frame_count; /* first_rows[low] <= row < first_rows[high] */

    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;

        if (rows->first_rows[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

struct wanted {
    uint32_t position;
    uint32_t number; /* in the caller's order */
};

static int compare_wanted(const void *a, const void *b)
{
    const struct wanted *x = a, *y = b;

    return (x->position > y->position) - (x->position < y->position);
}

/* One call of rows_fetch. */
struct fetch {
    const struct rows *rows;
    struct wanted *wanted; /* by position */
    uint32_t count;
    uint32_t next;              /* of wanted: not yet copied out */
    struct segment_span *spans; /* one per frame of the batch */
    uint64_t *frames;
    uint32_t batch_max;
    uint8_t *compressed; /* the batch's frames, one after the other */
    uint64_t compressed_capacity;
    uint8_t *raw; /* of one frame */
    uint64_t raw_capacity;
    uint8_t *kept; /* the records asked for; moves as it grows, so offsets[] instead of pointers */
    uint64_t kept_bytes;
    uint64_t kept_capacity;
    uint64_t *offsets; /* per number */
    ZSTD_DCtx *zstd;
};

static int grow(uint8_t **data, uint64_t *capacity, uint64_t bytes, struct error *err)
{
    uint64_t wanted = *capacity ? *capacity : 4096;
    uint8_t *grown;

    if (bytes <= *capacity)
        return 0;
    while (wanted < bytes)
        wanted *= 2;
    grown = realloc(*data, wanted);
    if (!grown)
        return error_set(err, ERR_NOMEM, "no memory for %" PRIu64 " bytes of rows", wanted);
    *data = grown;
    *capacity = wanted;
    return 0;
}

/* Chooses the frames of the next batch, from f->next on, and reads them. */
static int batch_read(struct fetch *f, struct reader *reader, uint32_t *frame_count,
                      struct error *err)
{
    const struct rows *rows = f->rows;
    uint64_t bytes = 0;
    uint32_t count = 0;

    for (uint32_t i = f->next; i < f->count; i++) {
        uint64_t frame = frame_of(rows, f->wanted[i].position);
        uint64_t frame_bytes = rows->offsets[frame + 1] - rows->offsets[frame];

        if (count > 0 && f->frames[count - 1] == frame)
            continue;
        if (count == f->batch_max || (count > 0 && bytes + frame_bytes > BATCH_BYTES_MAX))
            break;
        f->frames[count] = frame;
        f->spans[count++] = (struct segment_span){.section = rows->section,
                                                  .offset = rows->offsets[frame],
                                                  .bytes = (uint32_t)frame_bytes};
        bytes += frame_bytes;
    }
    if (grow(&f->compressed, &f->compressed_capacity, bytes, err) < 0)
        return -1;
    bytes = 0;
    for (uint32_t i = 0; i < count; i++) {
        f->spans[i].out = f->compressed + bytes;
        bytes += f->spans[i].bytes;
    }
    *frame_count = count;
    return segment_read_spans(rows->segment, reader, f->spans, count, NULL, err);
}

/* Decompresses frame `frame` into f->raw and checks the record ends. */
static int frame_open(struct fetch *f, uint64_t frame, const struct segment_span *span,
                      struct error *err)
{
    const struct rows *rows = f->rows;
    uint64_t ends_bytes = 4 * (uint64_t)(rows->first_rows[frame + 1] - rows->first_rows[frame]);
    uint64_t raw_bytes = ZSTD_getFrameContentSize(span->out, span->bytes); /* errors are huge */
    size_t got;
    uint32_t end = 0;

    if (raw_bytes > FRAME_RAW_BYTES_MAX || raw_bytes < ends_bytes)
        return error_set(err, ERR_CORRUPT,
                         "%s: the frame at byte %" PRIu64 " does not hold its %" PRIu64 " rows",
                         rows->section->path, span->offset, ends_bytes / 4);
    if (grow(&f->raw, &f->raw_capacity, raw_bytes, err) < 0)
        return -1;
    got = ZSTD_decompressDCtx(f->zstd, f->raw, raw_bytes, span->out, span->bytes);
    if (ZSTD_isError(got) || got != raw_bytes)
        return error_set(err, ERR_CORRUPT, "%s: the frame at byte %" PRIu64 ": %s",
                         rows->section->path, span->offset,
                         ZSTD_isError(got) ? ZSTD_getErrorName(got) : "ends early");
    for (uint64_t i = 0; i < ends_bytes; i += 4) {
        uint32_t next = load_u32(f->raw + i);

        if (next < end || next > raw_bytes - ends_bytes)
            return error_set(
                err, ERR_CORRUPT,
                "%s: the frame at byte %" PRIu64 ": record %" PRIu64 " ends at %u of %" PRIu64,
                rows->section->path, span->offset, i / 4, next, raw_bytes - ends_bytes);
        end = next;
    }
    if (end != raw_bytes - ends_bytes)
        return error_set(err, ERR_CORRUPT,
                         "%s: the frame at byte %" PRIu64 " has bytes after its last record",
                         rows->section->path, span->offset);
    return 0;
}

/* Copies what is wanted of the frame in f->raw. */
static int frame_copy(struct fetch *f, uint64_t frame, struct rows_record *out, struct error *err)
{
    const struct rows *rows = f->rows;
    uint32_t first = rows->first_rows[frame], end_row = rows->first_rows[frame + 1];
    const uint8_t *records = f->raw + 4 * (uint64_t)(end_row - first);

    for (; f->next < f->count && f->wanted[f->next].position < end_row; f->next++) {
        const struct wanted *wanted = &f->wanted[f->next];
        uint32_t at = wanted->position - first;
        uint32_t start = at ? load_u32(f->raw + 4 * (uint64_t)(at - 1)) : 0;
        uint32_t bytes = load_u32(f->raw + 4 * (uint64_t)at) - start;

        out[wanted->number].bytes = bytes;
        if (f->next > 0 && wanted[-1].position == wanted->position) {
            f->offsets[wanted->number] = f->offsets[wanted[-1].number];
            continue;
        }
        if (grow(&f->kept, &f->kept_capacity, f->kept_bytes + bytes, err) < 0)
            return -1;
        if (bytes)
            memcpy(f->kept + f->kept_bytes, records + start, bytes);
        f->offsets[wanted->number] = f->kept_bytes;
        f->kept_bytes += bytes;
    }
    return 0;
}

static int fetch_prepare(struct fetch *f, const uint32_t *positions, struct error *err)
{
    for (uint32_t i = 0; i < f->count; i++)
        if (positions[i] >= f->rows->row_count)
            return error_set(err, ERR_INVALID, "%s: row %u of %" PRIu64 " was asked for",
                             f->rows->section->path, positions[i], f->rows->row_count);
    if (f->batch_max > f->count)
        f->batch_max = f->count;
    f->wanted = malloc((size_t)f->count * sizeof *f->wanted);
    f->offsets = malloc((size_t)f->count * sizeof *f->offsets);
    f->spans = malloc((size_t)f->batch_max * sizeof *f->spans);
    f->frames = malloc((size_t)f->batch_max * sizeof *f->frames);
    f->zstd = ZSTD_createDCtx();
    if (!f->wanted || !f->offsets || !f->spans || !f->frames || !f->zstd ||
        grow(&f->kept, &f->kept_capacity, 1, NULL) < 0)
        return error_set(err, ERR_NOMEM, "no memory to fetch %u rows", f->count);
    for (uint32_t i = 0; i < f->count; i++)
        f->wanted[i] = (struct wanted){positions[i], i};
    qsort(f->wanted, f->count, sizeof *f->wanted, compare_wanted);
    return 0;
}

int rows_fetch(const struct rows *rows, struct reader *reader, const uint32_t *positions,
               uint32_t count, struct rows_record *out, uint8_t **storage, struct error *err)
{
    struct fetch f = {.rows = rows, .count = count, .batch_max = reader_depth(reader)};
    int rc = -1;

    *storage = NULL;
    if (count == 0)
        return 0;
    if (fetch_prepare(&f, positions, err) < 0)
        goto done;
    while (f.next < f.count) {
        uint32_t frame_count;

        if (batch_read(&f, reader, &frame_count, err) < 0)
            goto done;
        for (uint32_t i = 0; i < frame_count; i++)
            if (frame_open(&f, f.frames[i], &f.spans[i], err) < 0 ||
                frame_copy(&f, f.frames[i], out, err) < 0)
                goto done;
    }
    for (uint32_t i = 0; i < count; i++)
        out[i].data = f.kept + f.offsets[i];
    *storage = f.kept;
    f.kept = NULL;
    rc = 0;
done:
    ZSTD_freeDCtx(f.zstd);
    free(f.wanted);
    free(f.offsets);
    free(f.spans);
    free(f.frames);
    free(f.compressed);
    free(f.raw);
    free(f.kept);
    return rc;
}

/* ---- keys ---- */

int keys_write(struct segment_writer *writer, const struct key_entry *entries, uint64_t count,
               struct error *err)
{
    uint8_t run[RUN_BYTES], tail[KEYS_TAIL_BYTES];
    uint64_t fence_count = 0;

    for (uint64_t first = 0; first < count; first += RUN_ENTRIES) {
        uint32_t in_run = count - first < RUN_ENTRIES ? (uint32_t)(count - first) : RUN_ENTRIES;

        for (uint32_t i = 0; i < in_run; i++) {
            const struct key_entry *entry = &entries[first + i];

            if (first + i > 0 &&
                (entry[-1].ordinal > entry->ordinal ||
                 (entry[-1].ordinal == entry->ordinal && entry[-1].position >= entry->position)))
                return error_set(err, ERR_INVALID, "key entry %" PRIu64 " is out of order",
                                 first + i);
            store_u64(run + i * KEY_ENTRY_BYTES, entry->ordinal);
            store_u32(run + i * KEY_ENTRY_BYTES + 8, entry->position);
        }
        if (segment_writer_append(writer, run, (uint64_t)in_run * KEY_ENTRY_BYTES, err) < 0)
            return -1;
    }
    for (uint64_t first = 0; first < count; first += RUN_ENTRIES) {
        uint8_t fence[8];

        store_u64(fence, entries[first].ordinal);
        if (segment_writer_append(writer, fence, sizeof fence, err) < 0)
            return -1;
        fence_count++;
    }
    store_u64(tail, count);
    store_u64(tail + 8, fence_count);
    return segment_writer_append(writer, tail, sizeof tail, err);
}

struct keys {
    const struct segment *segment;
    const struct segment_section *section;
    uint64_t entry_count;
    uint64_t fence_count;
    uint64_t *fences; /* the ordinal of entry i * RUN_ENTRIES */
};

static int fences_read(struct keys *keys, struct error *err)
{
    uint64_t bytes = keys->fence_count * sizeof *keys->fences;

    keys->fences = malloc(bytes ? bytes : 1);
    if (!keys->fences)
        return error_set(err, ERR_NOMEM, "%s: no memory for %" PRIu64 " fences",
                         keys->section->path, keys->fence_count);
    if (segment_read(keys->segment, keys->section, keys->entry_count * KEY_ENTRY_BYTES, bytes,
                     keys->fences, err) < 0)
        return -1;
    for (uint64_t i = 0; i < keys->fence_count; i++) {
        keys->fences[i] = load_u64(&keys->fences[i]);
        if (i > 0 && keys->fences[i] < keys->fences[i - 1])
            return error_set(err, ERR_CORRUPT, "%s: fence %" PRIu64 " is below the one before",
                             keys->section->path, i);
    }
    return 0;
}

int keys_open(const struct segment *segment, const struct segment_section *section,
              struct keys **out, struct error *err)
{
    struct keys *keys = calloc(1, sizeof *keys);
    uint64_t payload = section->payload_bytes;
    uint8_t tail[KEYS_TAIL_BYTES];
    int rc = -1;

    *out = NULL;
    if (!keys)
        return error_set(err, ERR_NOMEM, "%s: no memory to open it", section->path);
    keys->segment = segment;
    keys->section = section;
    if (payload < sizeof tail) {
        error_set(err, ERR_CORRUPT, "%s: %" PRIu64 " bytes are too few for a key table",
                  section->path, payload);
        goto done;
    }
    if (segment_read(segment, section, payload - sizeof tail, sizeof tail, tail, err) < 0)
        goto done;
    keys->entry_count = load_u64(tail);
    keys->fence_count = load_u64(tail + 8);
    /* A position is 32 bits, so what follows cannot overflow. */
    if (keys->entry_count > UINT32_MAX || keys->entry_count > segment_row_count(segment)) {
        error_set(err, ERR_CORRUPT, "%s: holds %" PRIu64 " keys, the segment %" PRIu64 " rows",
                  section->path, keys->entry_count, segment_row_count(segment));
        goto done;
    }
    if (keys->fence_count != (keys->entry_count + RUN_ENTRIES - 1) / RUN_ENTRIES ||
        payload != keys->entry_count * KEY_ENTRY_BYTES + keys->fence_count * 8 + sizeof tail) {
        error_set(err, ERR_CORRUPT,
                  "%s: %" PRIu64 " keys and %" PRIu64 " fences do not make %" PRIu64
                  " bytes of payload",
                  section->path, keys->entry_count, keys->fence_count, payload);
        goto done;
    }
    if (fences_read(keys, err) < 0)
        goto done;
    *out = keys;
    keys = NULL;
    rc = 0;
done:
    keys_close(keys);
    return rc;
}

void keys_close(struct keys *keys)
{
    if (!keys)
        return;
    free(keys->fences);
    free(keys);
}

uint64_t keys_memory_bytes(const struct keys *keys)
{
    return sizeof *keys + keys->fence_count * sizeof *keys->fences;
}

/* How many fences are below `ordinal`; with `equal`, below or equal. */
static uint64_t fences_below(const struct keys *keys, uint64_t ordinal, bool equal)
{
    uint64_t low = 0, high = keys->fence_count;

    while (low < high) {
        uint64_t middle = low + (high - low) / 2;

        if (keys->fences[middle] < ordinal || (equal && keys->fences[middle] == ordinal))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* One ordinal of keys_find, with the runs [first_run, end_run) that can hold it. */
struct sought {
    uint64_t ordinal;
    uint32_t number; /* in the caller's order */
    uint32_t slot;   /* of its first run among the batch's; the others follow */
    uint64_t first_run;
    uint64_t end_run;
};

static int compare_sought(const void *a, const void *b)
{
    const struct sought *x = a, *y = b;

    return (x->ordinal > y->ordinal) - (x->ordinal < y->ordinal);
}

/* The first of its entries lies in the last run whose fence is below the ordinal, or opens the run
 * after; they go on until a fence is above it. More than positions_max are not looked at, which
 * bounds what a file full of equal ordinals can make us read. */
static void runs_choose(const struct keys *keys, uint32_t positions_max, struct sought *s)
{
    uint64_t below = fences_below(keys, s->ordinal, false);
    uint64_t needed = 2 + (uint64_t)positions_max / RUN_ENTRIES + 1;

    s->first_run = below ? below - 1 : 0;
    s->end_run = fences_below(keys, s->ordinal, true);
    if (s->end_run < s->first_run)
        s->end_run = s->first_run;
    if (s->end_run - s->first_run > needed)
        s->end_run = s->first_run + needed;
}

static uint32_t run_entries(const struct keys *keys, uint64_t run)
{
    uint64_t left = keys->entry_count - run * RUN_ENTRIES;

    return left < RUN_ENTRIES ? (uint32_t)left : RUN_ENTRIES;
}

/* The runs of one burst. */
struct key_batch {
    struct segment_span *spans;
    uint64_t *runs;
    uint32_t count;
    uint32_t capacity;
    uint8_t *data; /* capacity x RUN_BYTES */
};

/* Makes the runs of *s part of the batch; false when they do not fit any more. Ordinals come in
 * ascending order, so runs shared with earlier ones are the last of the batch. */
static bool batch_add(struct key_batch *batch, const struct keys *keys, struct sought *s)
{
    uint64_t run = s->first_run;
    uint64_t after = batch->count ? batch->runs[batch->count - 1] + 1 : 0;

    if (run < after) {
        s->slot = batch->count - (uint32_t)(after - run);
        run = after;
    } else {
        s->slot = batch->count;
    }
    if (run < s->end_run && s->end_run - run > batch->capacity - batch->count)
        return false;
    for (; run < s->end_run; run++) {
        batch->runs[batch->count] = run;
        batch->spans[batch->count] =
            (struct segment_span){.section = keys->section,
                                  .offset = run * RUN_BYTES,
                                  .bytes = run_entries(keys, run) * KEY_ENTRY_BYTES,
                                  .out = batch->data + (uint64_t)batch->count * RUN_BYTES};
        batch->count++;
    }
    return true;
}

static int batch_fetch(const struct key_batch *batch, const struct keys *keys,
                       struct reader *reader, struct error *err)
{
    if (batch->count == 0)
        return 0;
    if (segment_read_spans(keys->segment, reader, batch->spans, batch->count, NULL, err) < 0)
        return -1;
    for (uint32_t i = 0; i < batch->count; i++)
        if (load_u64(batch->spans[i].out) != keys->fences[batch->runs[i]])
            return error_set(err, ERR_CORRUPT, "%s: run %" PRIu64 " does not begin with its fence",
                             keys->section->path, batch->runs[i]);
    return 0;
}

static int entries_collect(const struct keys *keys, const struct key_batch *batch,
                           const struct sought *s, uint32_t positions_max, uint32_t *positions,
                           uint32_t *found, struct error *err)
{
    const uint8_t *entries = batch->data + (uint64_t)s->slot * RUN_BYTES;
    uint64_t low = 0, high, count = 0;

    *found = 0;
    /* All runs but the last of the section are full, so neighbours in the batch are one array. */
    if (s->end_run > s->first_run)
        count = (s->end_run - s->first_run - 1) * RUN_ENTRIES + run_entries(keys, s->end_run - 1);
    high = count;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;

        if (load_u64(entries + middle * KEY_ENTRY_BYTES) < s->ordinal)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < count && *found < positions_max; low++) {
        const uint8_t *entry = entries + low * KEY_ENTRY_BYTES;
        uint32_t position = load_u32(entry + 8);

        if (load_u64(entry) != s->ordinal)
            break;
        if (position >= segment_row_count(keys->segment))
            return error_set(err, ERR_CORRUPT, "%s: a key has row %u of %" PRIu64,
                             keys->section->path, position, segment_row_count(keys->segment));
        positions[(*found)++] = position;
    }
    return 0;
}

static int batch_alloc(struct key_batch *batch, const struct keys *keys, uint32_t count,
                       uint32_t positions_max, struct error *err)
{
    uint64_t of_one = 3 + (uint64_t)positions_max / RUN_ENTRIES;
    uint64_t capacity = of_one * count;

    if (capacity > BATCH_BYTES_MAX / RUN_BYTES)
        capacity = BATCH_BYTES_MAX / RUN_BYTES;
    if (capacity < of_one)
        capacity = of_one;
    if (capacity > keys->fence_count)
        capacity = keys->fence_count;
    batch->capacity = (uint32_t)capacity;
    batch->spans = malloc((capacity + 1) * sizeof *batch->spans);
    batch->runs = malloc((capacity + 1) * sizeof *batch->runs);
    batch->data = malloc(capacity * RUN_BYTES + 1);
    if (!batch->spans || !batch->runs || !batch->data)
        return error_set(err, ERR_NOMEM, "no memory to look up %u keys", count);
    return 0;
}

int keys_find(const struct keys *keys, struct reader *reader, const uint64_t *ordinals,
              uint32_t count, uint32_t positions_max, uint32_t *positions, uint32_t *found,
              struct error *err)
{
    struct key_batch batch = {.count = 0};
    struct sought *sought = NULL;
    uint32_t from = 0;
    int rc = -1;

    if (count == 0)
        return 0;
    sought = malloc((size_t)count * sizeof *sought);
    if (!sought) {
        error_set(err, ERR_NOMEM, "no memory to look up %u keys", count);
        goto done;
    }
    if (batch_alloc(&batch, keys, count, positions_max, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++) {
        sought[i] = (struct sought){.ordinal = ordinals[i], .number = i};
        runs_choose(keys, positions_max, &sought[i]);
    }
    qsort(sought, count, sizeof *sought, compare_sought);
    while (from < count) {
        uint32_t to = from;

        batch.count = 0;
        while (to < count && batch_add(&batch, keys, &sought[to]))
            to++;
        if (batch_fetch(&batch, keys, reader, err) < 0)
            goto done;
        for (; from < to; from++) {
            uint32_t number = sought[from].number;

            if (entries_collect(keys, &batch, &sought[from], positions_max,
                                positions + (uint64_t)number * positions_max, &found[number],
                                err) < 0)
                goto done;
        }
    }
    rc = 0;
done:
    free(sought);
    free(batch.spans);
    free(batch.runs);
    free(batch.data);
    return rc;
}
