/* rows: the records of a segment in row-position order, zstd-compressed in frames, and `keys`: the
 * sorted primary keys.
 *
 * `rows` payload: frames (independent zstd frames of about 16 KiB of records each, a frame holding
 * u32 record ends then the records), then the frame table: per frame u64 offset and u32 first row;
 * the last 24 bytes are u64 table offset, u64 frame count, u64 row count.
 *
 * `keys` payload: 12-byte entries (u64 ordinal, u32 row position) sorted by (ordinal, row), then
 * the fences: the ordinal of each 341st entry; last 16 bytes: u64 entry count, u64 fence count. The
 * ordinal of an int64 key is the key with its sign bit flipped; of a varchar key it is key_hash(),
 * and the record has the text to compare. */
#ifndef ANND_INDEX_ROWS_H
#define ANND_INDEX_ROWS_H

#include <stdint.h>

#include "index/record.h"
#include "storage/segment.h"
#include "storage/segment_writer.h"

static inline uint64_t key_ordinal_int64(int64_t key)
{
    return (uint64_t)key ^ (UINT64_C(1) << 63);
}

struct rows_writer;

/* The section must have been begun on `writer`. */
int rows_writer_new(struct segment_writer *writer, struct rows_writer **out, struct error *err);
int rows_writer_append(struct rows_writer *rows, const uint8_t *record, size_t bytes,
                       struct error *err);
/* Writes the frame table; does not end the section. */
int rows_writer_finish(struct rows_writer *rows, struct error *err);
void rows_writer_free(struct rows_writer *rows);

struct rows; /* the resident frame table; any thread, each with its own reader */

int rows_open(const struct segment *segment, const struct segment_section *section,
              struct rows **out, struct error *err);
void rows_close(struct rows *rows);
uint64_t rows_memory_bytes(const struct rows *rows);

/* Records of `count` positions in one burst. out[i] points into *storage (malloc'ed, one block,
 * free() it). ERR_INVALID beyond the last row. */
struct rows_record {
    const uint8_t *data;
    uint32_t bytes;
};
int rows_fetch(const struct rows *rows, struct reader *reader, const uint32_t *positions,
               uint32_t count, struct rows_record *out, uint8_t **storage, struct error *err);

struct key_entry {
    uint64_t ordinal;
    uint32_t position;
};

/* Appends the sorted entries and fences to the begun section. Entries must be sorted. */
int keys_write(struct segment_writer *writer, const struct key_entry *entries, uint64_t count,
               struct error *err);

struct keys; /* the resident fences; any thread, each with its own reader */

int keys_open(const struct segment *segment, const struct segment_section *section,
              struct keys **out, struct error *err);
void keys_close(struct keys *keys);
uint64_t keys_memory_bytes(const struct keys *keys);
/* Positions of all entries with this ordinal, up to positions_max, for `count` ordinals in one
 * burst: found[i] is how many were written to positions[i * positions_max ...]. */
int keys_find(const struct keys *keys, struct reader *reader, const uint64_t *ordinals,
              uint32_t count, uint32_t positions_max, uint32_t *positions, uint32_t *found,
              struct error *err);

#endif
