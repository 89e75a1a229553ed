/* walk_rule: how far a query's walk goes, and the table that gives the rule for a wanted recall.
 *
 * A walk stops when enough reads in a row brought nothing new and few better rows can still be
 * expected among the candidates it has not read: the sum, over them, of the probability that their
 * true distance is below that of the k-th hit, the estimate's error taken as normal with the
 * code's own distortion. Which `patience` and `gain` reach a recall, and at the fewest reads, is
 * measured when a segment is built (calibrate.h) and stored with it. */
#ifndef ANND_INDEX_WALK_RULE_H
#define ANND_INDEX_WALK_RULE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "storage/base/error.h"

struct walk_rule {
    uint32_t search_list; /* candidates kept, estimated or read; loaded nodes in it are expanded */
    uint32_t cells; /* scanned for seeds at most before the first read; 0: the entry point alone */
    uint32_t patience; /* s: the last so many reads must have brought no new hit */
    float gain;        /* tau: stop below so many expected hits; 0: read the whole list */
};

/* One measured point. */
struct walk_point {
    float recall; /* target */
    struct walk_rule rule;
    float reached; /* recall on the calibration's queries */
    float reads;   /* mean a query, in 4 KiB units, at one read in flight */
};

#define WALK_POINTS_MAX 16u
#define WALK_CURVES_MAX 32u

/* Rules for rising targets at one k and one share of resident pages. */
struct walk_curve {
    uint32_t k;
    float resident_share; /* 0..1 of the pages */
    uint32_t point_count;
    struct walk_point points[WALK_POINTS_MAX]; /* ascending by recall */
};

struct walk_calibration {
    uint32_t query_count;
    bool
        own_queries; /* measured with queries the user gave; else with rows left out of the order */
    uint32_t curve_count;
    struct walk_curve curves[WALK_CURVES_MAX]; /* ascending by (k, resident_share) */
};

/* The rule for `recall` (above 0, below 1) and k: of the nearest calibrated k (by ratio; gain is
 * scaled by k over the calibrated k, for a greater k search_list as well) and the nearest resident
 * share not above the given one (by half a hundredth at most); rules between two targets are
 * interpolated (gain by its logarithm, whole numbers upwards), beyond the last target gain falls in
 * proportion to 1 - recall. A higher recall never gets a laxer rule. Without a calibration (NULL,
 * or none) a cautious rule of thumb. search_list is at least k. *reads_expected may be NULL; it is
 * 0, unknown, for a k that was not calibrated and beyond the last target. */
void walk_rule_for_recall(const struct walk_calibration *calibration, double recall, uint32_t k,
                          double resident_share, struct walk_rule *out, float *reads_expected);
/* The rule of an explicit list: all of it is read. */
void walk_rule_for_list(const struct walk_calibration *calibration, uint32_t search_list,
                        uint32_t k, struct walk_rule *out);

/* Bytes of the section "f<field>.calibration" and back; `where` names the source. ERR_CORRUPT. */
int walk_calibration_encode(const struct walk_calibration *calibration, uint8_t **out,
                            size_t *bytes, struct error *err);
int walk_calibration_decode(const uint8_t *data, size_t bytes, const char *where,
                            struct walk_calibration *out, struct error *err);

#endif
