#!/bin/bash
# Starts Python and imports a large package, again and again.
while :; do
  if python3 -B -c 'import django.core.handlers.wsgi, django.db.models, django.contrib.admin, email, json, sqlite3'; then
    echo OK
  else
    echo "FAILED: import"
  fi
done
