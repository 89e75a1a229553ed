/* queries: what the verbs that search have in common: a file of query vectors, the rule a search
 * goes by, and an engine sized for it. */
#ifndef ANND_TOOLS_QUERIES_H
#define ANND_TOOLS_QUERIES_H

#include <stdint.h>

#include "index/index_directory.h"
#include "index/search_engine.h"
#include "index/vector_source.h"
#include "storage/base/error.h"
#include "tools/options.h"

#define SEARCH_TARGETS_MAX 64u

struct queries {
    float *vectors; /* count x dim */
    uint32_t count;
    uint32_t dim;
};

/* ERR_INVALID: NaN, infinity, or a dimension other than dim (0: any). */
int queries_read(const char *path, uint32_t dim, struct queries *out, struct error *err);
void queries_release(struct queries *queries);

/* How far a search goes: to a recall, or through a list. */
struct search_target {
    double recall;        /* 0: search_list says it */
    uint32_t search_list; /* 0: recall says it */
};

/* "--recall 0.9,0.95" or "--search-list 16,24" as the user gave them; none when neither was given.
 * ERR_INVALID: both were, a recall that is not between 0 and 1, a list that is not
 * 1..SEARCH_LIST_MAX, more than *count of them. *count in: room, out: how many. */
int search_targets_parse(const struct arguments *arguments, struct search_target *out,
                         uint32_t *count, struct error *err);
/* The rule that takes this index there; *reads_expected (may be NULL) is 0 when not known. */
struct walk_rule search_target_rule(const struct search_target *target,
                                    const struct disk_index *index, uint32_t k,
                                    float *reads_expected);

/* Raises the limits of an engine to a search of this index by this rule; beam_width and k_max are
 * the caller's to set. */
void search_limits_raise(struct disk_search_limits *limits, const struct disk_index *index,
                         const struct walk_rule *rule);

#endif
