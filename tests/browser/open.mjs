// Opens a page in the packaged browser, and keeps what it asks for and complains of.
//
// The packages of package.json are looked for beside this file, or in the folder that the
// environment variable SR_JAX_BROWSER names (the one that holds node_modules).
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const here = path.dirname(fileURLToPath(import.meta.url));
const require = createRequire(path.join(process.env.SR_JAX_BROWSER || here, 'package.json'));
const { chromium: playwright } = require('playwright-core');
const packaged = require('@sparticuz/chromium');
const chromium = packaged.default ?? packaged;

// `url` and what begins with `allowed` may be loaded; all else is refused and recorded.
export async function open(url, { allowed = null, viewport = { width: 1200, height: 900 } } = {}) {
  // Its own arguments switch web security off; here the page's policy has to hold. Without a
  // sandbox, because root in a container has none.
  const browser = await playwright.launch({
    executablePath: await chromium.executablePath(),
    args: ['--no-sandbox', '--disable-gpu', '--font-render-hinting=none'],
  });
  const context = await browser.newContext({ viewport, colorScheme: 'light', acceptDownloads: true });
  if (!allowed) await context.setOffline(true);
  const requests = [], errors = [], dialogs = [];
  await context.route('**/*', (route) => {
    const asked = route.request().url();
    if (asked === url || (allowed && asked.startsWith(allowed))) return route.continue();
    requests.push(asked.slice(0, 200));
    return route.abort();
  });
  const page = await context.newPage();
  page.on('console', (message) => { if (message.type() === 'error') errors.push(message.text()); });
  page.on('pageerror', (error) => errors.push(String(error)));
  page.on('dialog', (dialog) => { dialogs.push(dialog.message()); dialog.dismiss(); });
  const began = Date.now();
  await page.goto(url);
  return { browser, page, requests, errors, dialogs, loaded: Date.now() - began };
}
