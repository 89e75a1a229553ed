/* How it works: small switches and one table of metric names. The names are Milvus' own, so a
 * request's text, a file's value and a message all read alike. */
#include "index/element.h"

#include <stddef.h>
#include <strings.h>

uint64_t element_bytes(enum element_type type, uint32_t dim)
{
    switch (type) {
    case ELEMENT_F32:
        return (uint64_t)dim * 4;
    case ELEMENT_F16:
    case ELEMENT_BF16:
        return (uint64_t)dim * 2;
    case ELEMENT_I8:
    case ELEMENT_U8:
        return dim;
    case ELEMENT_BINARY:
        return ((uint64_t)dim + 7) / 8;
    }
    return 0;
}

const char *element_name(enum element_type type)
{
    switch (type) {
    case ELEMENT_F32:
        return "f32";
    case ELEMENT_F16:
        return "f16";
    case ELEMENT_BF16:
        return "bf16";
    case ELEMENT_I8:
        return "i8";
    case ELEMENT_U8:
        return "u8";
    case ELEMENT_BINARY:
        return "binary";
    }
    return "unknown";
}

const char *metric_name(enum metric metric)
{
    switch (metric) {
    case METRIC_L2:
        return "L2";
    case METRIC_IP:
        return "IP";
    case METRIC_COSINE:
        return "COSINE";
    }
    return "unknown";
}

int metric_parse(const char *text, enum metric *out, struct error *err)
{
    static const enum metric metrics[] = {METRIC_L2, METRIC_IP, METRIC_COSINE};

    for (size_t i = 0; i < sizeof(metrics) / sizeof(metrics[0]); i++) {
        if (strcasecmp(text, metric_name(metrics[i])) == 0) {
            *out = metrics[i];
            return 0;
        }
    }
    return error_set(err, ERR_INVALID, "unknown metric \"%.64s\": choose L2, IP or COSINE", text);
}
