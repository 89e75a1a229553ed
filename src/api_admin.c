/* Health answers from the process alone: it says that requests are served, not how. */
#include <stdlib.h>
#include <string.h>

#include "src/api.h"
#include "src/metrics.h"

void api_healthz(struct http_exchange *exchange)
{
    const char *type = http_header(exchange, "Content-Type");

    if (type && strncmp(type, "application/json", 16) == 0)
        http_reply_static(exchange, 200, HTTP_JSON,
                          "{\"state\":\"OK\",\"detail\":[{\"name\":\"proxy\",\"code\":1}]}");
    else
        http_reply_static(exchange, 200, HTTP_TEXT, "OK");
}

void api_health(struct http_exchange *exchange)
{
    http_reply_static(exchange, 200, HTTP_JSON, "{\"status\":\"ok\"}");
}

void api_metrics(struct http_exchange *exchange)
{
    size_t bytes = 0;
    char *text = metrics_write(api_service(exchange), http_server_of(exchange), &bytes);

    if (text)
        http_reply(exchange, 200, "text/plain; version=0.0.4; charset=utf-8", text, bytes);
    else
        http_reply_static(exchange, 500, HTTP_TEXT, "memory limit exceeded");
}
