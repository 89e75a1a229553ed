/* field_facts: what a segment says about how a vector field was made: the codes that were tried,
 * the hot tiers, what the calibration reached. For the verbs that tell of it. */
#ifndef ANND_TOOLS_FIELD_FACTS_H
#define ANND_TOOLS_FIELD_FACTS_H

#include <stdint.h>

#include "index/page_layout.h"
#include "index/quantiser.h"
#include "index/walk_rule.h"
#include "storage/segment.h"

struct field_facts {
    const char *trials[CODE_TRIALS_MAX]; /* one sentence each; the segment's */
    uint32_t trial_count;
    uint64_t tier_rows[PAGE_LAYOUT_TIERS_MAX]; /* rows up to the end of each hot tier */
    uint32_t tier_count;
    uint64_t cell_pages; /* pages a cell spans */
    uint64_t cell_count;
    struct walk_calibration *calibration; /* NULL: none was made */
};

/* ERR_CORRUPT, ERR_IO, ERR_NOMEM. */
int field_facts_read(const struct segment *segment, uint32_t field, struct field_facts *out,
                     struct error *err);
void field_facts_release(struct field_facts *facts);

#endif
