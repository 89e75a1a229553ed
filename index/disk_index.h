/* disk_index: one vector field of an open segment, ready to be searched.
 *
 * Resident are the codes, the quantiser's tables and, as the budget allows, pages from the front of
 * the file. Everything else is read page by page. Immutable once open: any number of threads search
 * it at once, each with its own struct disk_search. */
#ifndef ANND_INDEX_DISK_INDEX_H
#define ANND_INDEX_DISK_INDEX_H

#include <stdbool.h>
#include <stdint.h>

#include "index/cells.h"
#include "index/distance.h"
#include "index/element.h"
#include "index/page_codec.h"
#include "index/quantiser.h"
#include "index/walk_rule.h"
#include "storage/segment.h"

struct disk_index {
    const struct segment *segment; /* borrowed */
    const struct segment_section *pages;
    const struct segment_section *originals; /* NULL: none */
    const struct distance_kernels *kernels;
    struct quantiser *quantiser;
    struct cells *cells;                  /* whole pages each */
    struct walk_calibration *calibration; /* NULL: none was made */
    uint8_t *codes;                       /* row_count x code_bytes, page order */
    uint8_t *resident_pages;              /* the first resident_page_count pages, verified once */
    uint64_t resident_page_count;
    struct page_format format;
    enum metric metric;
    enum element_type element; /* of the input */
    uint32_t field;
    uint32_t dim;
    uint32_t code_bytes;
    uint32_t row_count;
    uint32_t entry_point; /* position */
    uint32_t max_degree;
    uint32_t cell_pages;      /* pages a cell spans */
    uint64_t page_reciprocal; /* for disk_index_page */
    uint64_t cell_reciprocal; /* for disk_index_cell */
    bool normalised;          /* pages hold x / |x| (cosine on floats) */
    bool exact_pages;         /* a page's vector is the input bit for bit */
    uint64_t zero_vector_count;
    uint64_t memory_bytes; /* all that stays resident, tables included */
};

/* The page of a position and the cell of a page: divisions by a multiplication, exact for 32 bits
 * (the reciprocal is 2^64 / divisor, rounded up; one above 1 gives all). */
static inline uint32_t disk_index_page(const struct disk_index *index, uint32_t position)
{
    return index->format.capacity == 1
               ? position
               : (uint32_t)(((unsigned __int128)index->page_reciprocal * position) >> 64);
}
static inline uint32_t disk_index_cell(const struct disk_index *index, uint32_t page)
{
    return index->cell_pages == 1
               ? page
               : (uint32_t)(((unsigned __int128)index->cell_reciprocal * page) >> 64);
}
static inline double disk_index_resident_share(const struct disk_index *index)
{
    return (double)index->resident_page_count / (double)index->format.page_count;
}

/* Smallest budget disk_index_open accepts for this field. */
int disk_index_memory_min(const struct segment *segment, uint32_t field, uint64_t *bytes,
                          struct error *err);
/* memory_bytes bounds everything resident (0: only what must be). ERR_BUDGET spells the sum out;
 * ERR_CORRUPT; ERR_NOMEM. The segment outlives the index. */
int disk_index_open(const struct segment *segment, uint32_t field, uint64_t memory_bytes,
                    struct disk_index **out, struct error *err);
void disk_index_close(struct disk_index *index);

/* The input vectors of `count` row positions, exactly, as packed input elements (element_bytes
 * each) into out. ERR_NOT_FOUND when the originals were dropped and pages hold approximations. The
 * reader must be idle. */
int disk_index_vectors(const struct disk_index *index, struct reader *reader,
                       const uint32_t *positions, uint32_t count, void *out, struct error *err);
bool disk_index_has_vectors(const struct disk_index *index);
/* The int64 keys of `count` positions (they stand on the pages). The reader must be idle. */
int disk_index_keys(const struct disk_index *index, struct reader *reader,
                    const uint32_t *positions, uint32_t count, int64_t *out, struct error *err);

#endif
