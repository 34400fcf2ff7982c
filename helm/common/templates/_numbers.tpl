{{- /*
Arithmetic on whole numbers of small units (1/10000 GPU or CPU, as in Ray; MiB), so that 0.1 + 0.2 is 0.3 here and in Python.
job/batch_inference/kubernetes/capacity.py does the same, and a test compares the two.
*/}}

{{- /* A number in small units: list NUMBER UNITS. */}}
{{- define "common.units" -}}
{{- round (mulf (float64 (index . 0)) (float64 (index . 1))) 0 | int64 -}}
{{- end }}

{{- /* Small units as a readable number: list AMOUNT UNITS; 15000 of 10000 is 1.5. */}}
{{- define "common.shown" -}}
{{- regexReplaceAll "\\.?0+$" (printf "%.10f" (divf (float64 (index . 0)) (float64 (index . 1)))) "" -}}
{{- end }}

{{- /* Division that rounds up: list AMOUNT DIVISOR. */}}
{{- define "common.ceil" -}}
{{- $amount := int64 (index . 0) }}{{ $divisor := int64 (index . 1) -}}
{{- div (add $amount (sub $divisor 1)) $divisor -}}
{{- end }}
