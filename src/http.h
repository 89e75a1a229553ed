/* http: connections, limits and framing; what a request means is for its handler to say.
 *
 * A request reaches its handler only when its headers passed the gate, its path is a route and its
 * body is whole. The handler runs on one of the HTTP threads and must not block for long: it
 * either replies, or defers, and then any thread replies or asks for a continuation on the HTTP
 * thread. Memory of an exchange is its own until it has replied.
 *
 * Deadlines: 10 s for the headers, 30 s and one second per megabyte for the body and again for the
 * answer, 75 s idle between requests. */
#ifndef ANND_SRC_HTTP_H
#define ANND_SRC_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "storage/base/arena.h"
#include "storage/base/error.h"

#define HTTP_BODY_BYTES_MAX ((size_t)64 << 20)
#define HTTP_PATH_BYTES_MAX 256u
#define HTTP_TIMEOUT_SECONDS_DEFAULT 30u

enum http_method { HTTP_GET, HTTP_HEAD, HTTP_POST, HTTP_OPTIONS, HTTP_OTHER };

struct http_server;
struct http_exchange;

typedef void (*http_handler)(struct http_exchange *exchange);

struct http_route {
    enum http_method method; /* HTTP_GET answers HEAD too */
    const char *path;        /* compared byte by byte with the raw target, query string cut off */
    bool on_metrics_port;    /* served on the second listener as well */
    http_handler handler;
};

struct http_options {
    const char *listen;         /* "ADDR:PORT", "[ADDR6]:PORT"; port 0: any free one */
    const char *metrics_listen; /* NULL: no second listener; a taken one is only a warning */
    uint32_t threads;           /* at least 2 are started */
    uint32_t connection_max;
    uint32_t connection_per_ip_max; /* 0: no limit of its own */
    uint64_t body_memory_max;       /* bytes of all bodies held at once */
    const char *const *origins; /* foreign origins browsers may call from, "https://host:port" */
    uint32_t origin_count;
    const struct http_route *routes; /* borrowed while the server lives */
    uint32_t route_count;
    void *context; /* for handlers */
};

/* Counts since start. */
struct http_counters {
    uint64_t connections;
    uint64_t connections_refused;
    uint64_t connections_expired; /* by a deadline */
    uint64_t requests;
    uint64_t requests_refused; /* by the gate, before a handler */
    uint64_t received_bytes;   /* of bodies */
    uint64_t sent_bytes;
    uint32_t connections_open;
    uint32_t requests_running;
};

/* Splits "ADDR:PORT" or "[ADDR6]:PORT"; "localhost" is 127.0.0.1. ERR_INVALID. *loopback tells
 * whether only this machine can reach it. */
int http_parse_address(const char *text, char *host, size_t host_bytes, uint16_t *port,
                       bool *loopback, struct error *err);

/* Binds and serves. ERR_BUSY when the port is taken, ERR_PERMISSION, ERR_INVALID, ERR_NOMEM. */
int http_server_start(const struct http_options *options, struct http_server **out,
                      struct error *err);
/* Stops accepting, closes idle connections, and waits up to timeout_ms for requests under way to be
 * answered. Returns how many are still running; those are cancelled. */
uint32_t http_server_drain(struct http_server *server, uint32_t timeout_ms);
/* Joins all threads. Deferred exchanges must have been answered, or be answered soon by other
 * threads: it waits for them. NULL is accepted. */
void http_server_stop(struct http_server *server);

/* "127.0.0.1:19530" with the port that was bound. */
const char *http_server_address(const struct http_server *server);
/* NULL when there is no second listener. */
const char *http_server_metrics_address(const struct http_server *server);
void http_server_counters(struct http_server *server, struct http_counters *out);

/* Microseconds of CLOCK_MONOTONIC, the clock of all deadlines here. */
uint64_t http_now_us(void);

/* For handlers. The body is NUL-terminated and the exchange's; it may be changed in place. */
void *http_context(const struct http_exchange *exchange);
struct http_server *http_server_of(const struct http_exchange *exchange);
char *http_body(struct http_exchange *exchange, size_t *bytes);
const char *http_path(const struct http_exchange *exchange);
/* A pointer of the handler's, for its continuation; NULL until set. */
void http_set_call(struct http_exchange *exchange, void *call);
void *http_call(const struct http_exchange *exchange);
/* NULL when the header is missing; only on the HTTP thread (handler or continuation). */
const char *http_header(struct http_exchange *exchange, const char *name);
/* Freed with the exchange. */
struct arena *http_arena(struct http_exchange *exchange);
/* When the headers were complete; and until when the client wants to wait (Request-Timeout). */
uint64_t http_started_us(const struct http_exchange *exchange);
uint64_t http_deadline_us(const struct http_exchange *exchange);
/* Becomes true when the client left or the server gives up; points into the exchange. */
const bool *http_cancelled(const struct http_exchange *exchange);

/* Replies. `text` is malloc'ed and becomes the server's, also on failure. In the handler, in a
 * continuation, or after http_defer from any thread; once. The exchange is gone after it. */
void http_reply(struct http_exchange *exchange, unsigned status, const char *content_type,
                char *text, size_t bytes);
/* The same for text that outlives the server. */
void http_reply_static(struct http_exchange *exchange, unsigned status, const char *content_type,
                       const char *text);
/* Before http_reply: an extra header; both strings are static. One per exchange. */
void http_reply_header(struct http_exchange *exchange, const char *name, const char *value);

/* The handler will return without an answer. HTTP thread only. */
void http_defer(struct http_exchange *exchange);
/* After http_defer, from any thread, instead of a reply: `fn` runs on the HTTP thread, as a handler
 * would. The caller must not touch the exchange any more. */
void http_continue(struct http_exchange *exchange, http_handler fn);

#define HTTP_JSON "application/json; charset=utf-8"
#define HTTP_TEXT "text/plain; charset=utf-8"

#endif
